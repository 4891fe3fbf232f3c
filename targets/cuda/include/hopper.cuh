// GEMM for sm_90a: one warp group of a block brings tiles by TMA into a ring of stages, the others multiply them by wgmma and run the epilogue.
//
// Both operands lie in memory as rows of words of consecutive k (A [M][K], B [N][K]), or A's rows are windows of an image, which TMA gathers (im2col mode); the host makes the tensor maps
// that describe them (`encode`, `encode_windows` in host.cuh).
// A stage holds 32 words of k of BM rows of A and BN of B, a row in 128 bytes, whose 16-byte pieces TMA permutes by the row (swizzle of 128 bytes), so that the
// tensor cores read without bank conflicts. What lies outside of a matrix arrives as zeros.
#pragma once
#include "tcompile.cuh"
#ifdef TCOMPILE_SIMT
#include "simt_hopper.h"
#else
#include "device_hopper.cuh"
#endif

namespace tc {

// Registers of a thread: a warp group that copies gives up some to GROUPS that multiply; RESIDENT blocks of them fit a multiprocessor.
template <int GROUPS, int RESIDENT> struct WarpGroups {
  static constexpr int THREADS = 128 * (1 + GROUPS), COPYING = 32, LAUNCHED = 65536 / (THREADS * RESIDENT) / 8 * 8;
  static constexpr int SHARE = (LAUNCHED * (1 + GROUPS) - COPYING) / GROUPS / 8 * 8, MULTIPLYING = SHARE < 240 ? SHARE : 240;
};

// STAGES stages of shared memory that one thread fills and that warps read, all in the same order.
template <int STAGES, int BYTES> struct Ring {
  static constexpr int DATA = STAGES * BYTES, BARRIERS = STAGES * 16;
  char* const data;
  uint64_t *const full, *const empty;  // a stage has arrived; every warp has read it
  int slot = 0;
  uint32_t round = 0;  // modulo 2
  TC_DEVICE Ring(char* data, char* barriers) : data(data), full(reinterpret_cast<uint64_t*>(barriers)), empty(full + STAGES) {}
  TC_DEVICE void open(int warps) const {
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(full + stage, 1);
      barrier_init(empty + stage, warps);
    }
  }
  // The stage, when it may be filled, with so many bytes.
  TC_DEVICE char* fill(int bytes) const {
    barrier_wait(empty + slot, round ^ 1);
    barrier_expect(full + slot, bytes);
    return data + slot * BYTES;
  }
  // The address of the stage, when it has arrived. never: false, in a way that the compiler does not see: what it is computed from is computed before the wait.
  TC_DEVICE uint32_t read(bool never = false) const {
    barrier_wait(full + slot, round ^ (uint32_t)never);
    return shared_address(data) + slot * BYTES;
  }
  // This warp has read that stage.
  TC_DEVICE void release(int stage) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + stage);
  }
  TC_DEVICE void next() {
    if (++slot == STAGES) slot = 0, round ^= 1;
  }
};

// A block of T::GROUPS warp groups that multiply and one of whose threads one copies, with a ring of T::STAGES stages between them: copy(ring), multiply(ring, number of the group, lane).
template <class T, class Copy, class Multiply> TC_DEVICE void in_warp_groups(const Copy& copy, const Multiply& multiply) {
  TC_SHARED(char, shared);
  char* const stages = shared + (-shared_address(shared) & 1023);
  Ring<T::STAGES, T::STAGE_BYTES> ring(stages, stages + T::STAGES * T::STAGE_BYTES);
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    ring.open(4 * T::GROUPS);
    barriers_visible();
  }
  __syncthreads();
  if (group == 0) {
    give_registers<T::COPYING>();
    if (threadIdx.x == 0) copy(ring);
  } else {
    take_registers<T::MULTIPLYING>();
    multiply(ring, group - 1, lane);
  }
}

// BM x BN of C by GROUPS warp groups that multiply; STAGES stages.
template <int BM_, int BN_, int GROUPS_, int STAGES_, int RESIDENT> struct HopperTile : WarpGroups<GROUPS_, RESIDENT> {
  static constexpr int BM = BM_, BN = BN_, GROUPS = GROUPS_, STAGES = STAGES_, BK = 32, MT = BM / GROUPS / 64;
  static constexpr int ROW_BYTES = 4 * BK, A_BYTES = BM * ROW_BYTES, STAGE_BYTES = A_BYTES + BN * ROW_BYTES;
  static_assert(BM % (64 * GROUPS) == 0 && BM <= 256 && BN % 8 == 0 && BN <= 256, "whole products of 64 rows, boxes that TMA takes");
};

// How the tensor cores find a tile of shared memory that begins at `address` (of a row that is a multiple of 8): rows of 128 bytes, permuted in groups of eight,
// whose beginnings are 1024 bytes apart (PTX manual, matrix descriptor: address, strides in units of 16 bytes; 1 << 62: swizzle of 128 bytes).
// `apart`: of a matrix whose rows are k, from 64 columns to the next 64.
TC_DEVICE uint64_t descriptor(uint32_t address, int apart = 16) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(apart >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// Sources of a tile, which begins at row `row` of a map; bring: the 32 words of k of a step of all its rows.
struct MappedRows {
  const TensorMap& map;
  int row;
  TC_DEVICE void bring(void* to, int step, uint64_t* barrier) const { copy_tile(to, map, step * 32, row, barrier); }
};

// Windows of an NHWC image of C words a pixel: row = output pixel (n, oh, ow), steps = (kh, kw, words of the channels, by 32; zeros behind the last).
template <int C, int OH, int OW, int KW, int SH, int SW, int TOP, int LEFT, int DH, int DW> struct MappedWindows {
  const TensorMap& map;
  int w, h, n;
  TC_DEVICE MappedWindows(const TensorMap& map, int row) : map(map), w(row % OW * SW - LEFT), h(row / OW % OH * SH - TOP), n(row / (OW * OH)) {}
  TC_DEVICE void bring(void* to, int step, uint64_t* barrier) const {
    constexpr int PER_TAP = (C + 31) / 32;
    const int tap = step / PER_TAP;
    copy_window(to, map, step % PER_TAP * 32, w, h, n, tap % KW * DW, tap / KW * DH, barrier);
  }
};

// By the one thread that copies: so many steps of k of a tile, from step `first` on.
template <class T, class R, class SourceA, class SourceB> TC_DEVICE void hopper_copies(R& ring, const SourceA& a, const SourceB& b, int first, int steps) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ring.next()) {
    char* const stage = ring.fill(T::STAGE_BYTES);
    a.bring(stage, first + step, ring.full + ring.slot);
    b.bring(stage + T::A_BYTES, first + step, ring.full + ring.slot);
  }
}
// By a warp group whose rows begin at `own`: c += its products of so many steps. The stage of the last one, which is not released yet unless steps are summed apart, is returned.
template <class P, class T, class R> TC_DEVICE int hopper_sums(R& ring, int own, int steps, typename P::Sum (&c)[T::MT][T::BN / 2]) {
  int before = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step, ring.next()) {
    const uint32_t stage = ring.read();
    const uint64_t da = descriptor(stage + own * T::ROW_BYTES), db = descriptor(stage + T::A_BYTES);
    typename P::Sum block[T::MT][T::BN / 2];  // of this step, where it is summed apart
    products_begin();
#pragma unroll
    for (int bytes = 0; bytes < T::ROW_BYTES; bytes += 32)
#pragma unroll
      for (int i = 0; i < T::MT; ++i)
        Wgmma<P, T::BN>::multiply(P::blocked ? block[i] : c[i], da + ((i * 64 * T::ROW_BYTES + bytes) >> 4), db + (bytes >> 4), !P::blocked || bytes > 0);
    products_commit();
    if (P::blocked) {  // another warp group multiplies meanwhile
      products_wait<0>();
      ring.release(ring.slot);
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
        products_end(block[i]);
#pragma unroll
        for (int e = 0; e < T::BN / 2; ++e) c[i][e] += block[i][e];
      }
      continue;
    }
    products_wait<1>();  // those of the step before, whose stage may be filled again
    if (step > 0) ring.release(before);
    before = ring.slot;
  }
  products_wait<0>();
  return before;
}
// out[m0.., n0..] [rows][N] = value(row, column, sum) for the sums of a warp group.
template <class T, int N, class Sum, class Out, class Value>
TC_DEVICE void hopper_store(Sum (&c)[T::MT][T::BN / 2], int own, int lane, const Out& out, int rows, int m0, int n0, const Value& value) {
#pragma unroll
  for (int i = 0; i < T::MT; ++i) {
    products_end(c[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int m = m0 + own + i * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + r * 8;
      if (m < rows) {
#pragma unroll
        for (int j = 0; j < T::BN / 8; ++j) {
          const int n = n0 + j * 8 + lane % 4 * 2;
          put<N>(out, (size_t)m * N, n, [&](int e) { return value(m, n + e, c[i][4 * j + 2 * r + e]); });
        }
      }
    }
  }
}

// out[m0.., n0..] [rows][N] = value(row, column, sum) for the elements of A B' over `steps` steps of k, from step `first` on.
template <class P, class T, int N, class SourceA, class SourceB, class Out, class Value>
TC_DEVICE void gemm_hopper(const SourceA& a, const SourceB& b, const Out& out, int rows, int m0, int n0, int first, int steps, const Value& value) {
  in_warp_groups<T>([&](auto& ring) { hopper_copies<T>(ring, a, b, first, steps); },
                    [&](auto& ring, int group, int lane) {
                      const int own = group * T::MT * 64;  // its first row
                      typename P::Sum c[T::MT][T::BN / 2] = {};
                      hopper_sums<P, T>(ring, own, steps, c);
                      hopper_store<T, N>(c, own, lane, out, rows, m0, n0, value);
                    });
}

}  // namespace tc
