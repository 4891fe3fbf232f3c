// Products of 16-bit activations by constant weights of 1 to 8 bits for sm_90a: C^T = W^T X^T by wgmma, whose first operand, the weights, comes from registers.
//
// A warp group multiplies a strip of 64 columns of W, its rows of the product, by up to 128 rows of X in shared memory: a step is 64 k of both. Warp w has columns 16 w .. + 15 of the strip,
// lane l with g = l / 4, t = l % 4 their columns 2 g and the next. Of step and k16 i = 0 .. 3, register 2 h + r holds column 2 g + r at k = 16 i + 8 h + 2 t and the next, as wgmma wants it.
// So a lane owns 32 codes of a step, BITS words in planes as in weight_only.cuh, with k16 i in the place of step i / 2 and tile i % 2 there, and nothing is shuffled.
// One thread brings X by TMA, and codes, scales and zeros as they lie, into the ring of hopper.cuh. The sums of a group meet its scales in fp32 where it ends, and no weight is ever rounded.
// The codes of the next 32 k (16 where groups are no multiples of 32) are unpacked while the tensor cores multiply.
#pragma once
#include "hopper.cuh"
#include "weight_only.cuh"

namespace tc {

// BITS, the rows and columns of W, k per group, a multiple of 16 (or as many as there are). codes: [STRIPS][STEPS][BITS * 128] words; scales, zeros: [STRIPS][KEPT][64].
template <int BITS_, int K, int N_, int GROUP_, bool ZEROS_> struct HopperWeights {
  static constexpr int BITS = BITS_, N = N_, STEPS = (K + 63) / 64, GROUP = GROUP_ < K ? GROUP_ : 64 * STEPS, GROUPS = (K + GROUP - 1) / GROUP;
  static constexpr bool ZEROS = ZEROS_;
  static constexpr int COMMON = GROUP % 64 == 0 ? 64 : GROUP % 32 == 0 ? 32 : 16, PIECE = COMMON < 32 ? COMMON : 32;  // k between ends of groups, and of products that are asked for at once
  static constexpr int TOUCHED = (GROUP - COMMON + 63) / GROUP + 1, KEPT = GROUPS + TOUCHED - 1;                     // groups of a step at most; those in memory
  static constexpr int CODE_BYTES = 512 * BITS, SCALE_BYTES = 256 * TOUCHED, ZERO_BYTES = ZEROS ? 64 * TOUCHED : 0, STEP_BYTES = CODE_BYTES + SCALE_BYTES + ZERO_BYTES;
  static_assert(GROUP % 16 == 0, "products of 16 k");
  const int* codes;
  const float* scales;
  const unsigned char* zeros;

  TC_DEVICE void bring(char* to, int strip, int step, uint64_t* barrier) const {
    const size_t group = ((size_t)strip * KEPT + 64 * step / GROUP) * 64;
    copy_bytes(to, codes + ((size_t)strip * STEPS + step) * (BITS * 128), CODE_BYTES, barrier);
    copy_bytes(to + CODE_BYTES, scales + group, SCALE_BYTES, barrier);
    if (ZEROS) copy_bytes(to + CODE_BYTES + SCALE_BYTES, zeros + group, ZERO_BYTES, barrier);
  }
  // Of the groups that a step touches, that of its piece.
  static TC_DEVICE int group(int step, int piece) { return COMMON == 64 ? 0 : 64 % GROUP == 0 ? piece * PIECE / GROUP : (64 * step + piece * PIECE) / GROUP - 64 * step / GROUP; }
  // A group ends behind it.
  static TC_DEVICE bool ends(int step, int piece) { return (piece + 1) * PIECE % COMMON == 0 && (64 * step + (piece + 1) * PIECE) % GROUP == 0; }
};

// ROWS_ rows of X by a strip for each of GROUPS_ warp groups; STAGES_ stages.
template <class W, int ROWS_, int GROUPS_, int STAGES_, int RESIDENT> struct HopperStrips : WarpGroups<GROUPS_, RESIDENT> {
  static constexpr int ROWS = ROWS_, GROUPS = GROUPS_, STAGES = STAGES_, X_BYTES = 128 * ROWS;
  static constexpr int STEP_BYTES = X_BYTES + GROUPS * W::STEP_BYTES, STAGE_BYTES = (STEP_BYTES + 1023) / 1024 * 1024;
};

// A lane's codes of a step as fragments; two pieces, of which one is being multiplied.
template <bool BF16, class W> struct StripFragments {
  static constexpr int COUNT = W::PIECE / 16;  // of a piece
  UnitCodes<W::BITS> codes;
  uint32_t a[2][COUNT][4];

  TC_DEVICE void load(const char* step) { codes.load(reinterpret_cast<const float*>(step) + threadIdx.x / 32 % 4 * (W::BITS * 32), threadIdx.x % 32); }
  TC_DEVICE void unpack(const char* from, int step, int piece) {
    using C = Codes<W::BITS, BF16>;
    uint32_t zeros[4];
    if (W::ZEROS) {
      const char* const place = from + W::CODE_BYTES + W::SCALE_BYTES + W::group(step, piece) * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 * 2;
      const uint32_t bytes = *reinterpret_cast<const uint16_t*>(place);
      zeros[0] = zeros[2] = C::zero(bytes & 0xff), zeros[1] = zeros[3] = C::zero(bytes >> 8);
    }
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const int i = piece * COUNT + j;
      C::template fragment<W::ZEROS>(a[piece % 2][j], codes, i % 2, i / 2, zeros);
    }
  }
};

// out [m0 ..][64 strip0 ..] = value(row, column, sum) over the steps first .. last of K; x: the map of the rows of X.
template <bool BF16, class W, class T, class Out, class Value>
TC_DEVICE void weight_only_hopper(const W& w, const TensorMap& x, const Out& out, int rows, int m0, int strip0, int first, int last, const Value& value) {
  using P = Words<MmaHalf<BF16>>;
  constexpr int LAST = (W::N - 1) / 64, PIECES = 64 / W::PIECE;
  const auto copy = [&](auto& ring) {
#pragma unroll 1
    for (int step = first; step < last; ++step, ring.next()) {
      char* const stage = ring.fill(T::STEP_BYTES);
      uint64_t* const barrier = ring.full + ring.slot;
      copy_tile(stage, x, step * 32, m0, barrier);
#pragma unroll
      for (int i = 0; i < T::GROUPS; ++i) w.bring(stage + T::X_BYTES + i * W::STEP_BYTES, tc::min(strip0 + i, LAST), step, barrier);
    }
  };
  in_warp_groups<T>(copy, [&](auto& ring, int number, int lane) {
    const int warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4, own = T::X_BYTES + number * W::STEP_BYTES;
    float c[T::ROWS / 2] = {}, sum[T::ROWS / 2];
    StripFragments<BF16, W> weights;
    uint32_t rows_of_x = ring.read();
    const char* stage = ring.data;
    weights.load(stage + own);
    weights.unpack(stage + own, first, 0);
    bool more = false;  // sums of this group have begun
#pragma unroll 1
    for (int step = first; step < last; ++step) {
      const uint64_t columns = descriptor(rows_of_x);
      const char* const here = stage + own;
      const int slot = ring.slot;
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
#pragma unroll
        for (int j = 0; j < weights.COUNT; ++j) products_read(weights.a[piece % 2][j]);
        products_begin();
#pragma unroll
        for (int j = 0; j < weights.COUNT; ++j)
          WgmmaRows<P, T::ROWS, false>::multiply(sum, weights.a[piece % 2][j], columns + ((piece * weights.COUNT + j) * 32 >> 4), j > 0 || (W::GROUP > W::PIECE && more));
        products_commit();
        const bool ends = W::ends(step, piece) || (piece == PIECES - 1 && step == last - 1);
        struct alignas(8) Pair { float v[2]; };
        const Pair scales = *reinterpret_cast<const Pair*>(here + W::CODE_BYTES + W::group(step, piece) * 256 + warp * 64 + g * 8);
        products_wait<1>();  // those of the piece before, whose fragments may change
        if (piece < PIECES - 1) {
          weights.unpack(here, step, piece + 1);
        } else if (step < last - 1) {
          ring.next();
          rows_of_x = ring.read();
          stage = ring.data + ring.slot * T::STAGE_BYTES;
          weights.load(stage + own);
          weights.unpack(stage + own, step + 1, 0);
        }
        if (ends || piece == PIECES - 1) products_wait<0>();
        if (ends) {
          products_end(sum);
#pragma unroll
          for (int i = 0; i < T::ROWS / 2; ++i) c[i] = fmaf(scales.v[i / 2 % 2], sum[i], c[i]);
        }
        more = !ends;
      }
      ring.release(slot);
    }
#pragma unroll
    for (int j = 0; j < T::ROWS / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int m = m0 + 8 * j + 2 * t + e, n = (strip0 + number) * 64 + 16 * warp + 2 * g;
        if (m < rows) put<W::N>(out, (size_t)m * W::N, n, [&](int r) { return value(m, n + r, c[4 * j + 2 * r + e]); });
      }
  });
}

}  // namespace tc
