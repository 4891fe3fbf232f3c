// The machine below tcompile.cuh on an x86-64 CPU, to check kernels without a GPU: one fiber per thread of a block, blocks one after the other.
//
// Threads run until a barrier, shuffle or tensor-core product; the products follow the fragment layouts of the PTX manual. Asynchronous copies arrive only when they are
// waited for, and shared memory starts as NaN, so that a missing wait or barrier gives wrong numbers here too. Out of shared memory: abort.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <vector>

#define __restrict__
#define TC_DEVICE inline
#define TC_KERNEL(...) extern "C" __attribute__((visibility("hidden"))) void
#define TC_SHARED(type, name) type* const name = reinterpret_cast<type*>(tc::simt::machine.shared.data())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef int cudaError_t;
typedef void* cudaStream_t;

asm(R"(
.text
.globl tc_simt_switch
.type tc_simt_switch, @function
tc_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void tc_simt_switch(void** save, void* load);

namespace tc::simt {

struct Copy { float* to; const float* from; int floats; };
struct Fiber {
  void* stack_pointer;
  dim3 index;
  bool done;
  std::vector<std::vector<Copy>> groups;  // the last one is open
};
struct Warp {
  uint32_t in[32][16];
  uint32_t out[32][16];
  int arrived;
  unsigned generation;
};
struct Machine {
  std::vector<float> shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  void* scheduler;
  int current, threads, at_barrier;
  unsigned barrier;
  void (*body)(void*);
  void* arguments;
};
inline thread_local Machine machine;
constexpr size_t STACK = 64 << 10;

__attribute__((noinline)) inline void yield() {
  // to the next thread of the block that is not done; the caller is one of them
  Machine& m = machine;
  int next = m.current;
  do next = next + 1 == m.threads ? 0 : next + 1;
  while (m.fibers[next].done);
  if (next == m.current) return;
  const int from = m.current;
  m.current = next;
  tc_simt_switch(&m.fibers[from].stack_pointer, m.fibers[next].stack_pointer);
}

inline void start() {
  Machine& m = machine;
  m.body(m.arguments);
  m.fibers[m.current].done = true;
  for (int i = 1; i < m.threads; ++i) {
    const int next = (m.current + i) % m.threads;
    if (m.fibers[next].done) continue;
    void* ignored;
    m.current = next;
    tc_simt_switch(&ignored, m.fibers[next].stack_pointer);
  }
  void* ignored;
  tc_simt_switch(&ignored, m.scheduler);
}

inline void run_block(int threads) {
  Machine& m = machine;
  m.threads = threads;
  m.at_barrier = 0;
  if (m.stacks.size() < STACK * threads) m.stacks.resize(STACK * threads);
  m.fibers.resize(threads);
  m.warps.assign((threads + 31) / 32, Warp{});
  std::fill(m.shared.begin(), m.shared.end(), __builtin_nanf(""));
  for (int i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    f.done = false;
    f.index = dim3(i, 0, 0);
    f.groups.assign(1, {});
    uintptr_t top = reinterpret_cast<uintptr_t>(m.stacks.data() + STACK * (i + 1)) & ~uintptr_t(15);
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where start would return to; keeps the stack aligned as after a call
    *--sp = reinterpret_cast<void*>(&start);
    for (int r = 0; r < 6; ++r) *--sp = nullptr;
    f.stack_pointer = sp;
  }
  m.current = 0;
  tc_simt_switch(&m.scheduler, m.fibers[0].stack_pointer);
}

inline thread_local dim3 block_index, block_count;

// All lanes give their registers; the last one to come computes; everyone takes what is his.
template <class F> inline const uint32_t* meet(const uint32_t* give, int count, const F& compute) {
  Machine& m = machine;
  const int lane = m.current % 32, lanes = std::min(32, m.threads - m.current / 32 * 32);
  Warp& w = m.warps[m.current / 32];
  for (int i = 0; i < count; ++i) w.in[lane][i] = give[i];
  const unsigned generation = w.generation;
  if (++w.arrived == lanes) {
    compute(w);
    w.arrived = 0;
    ++w.generation;
  } else {
    while (w.generation == generation) yield();
  }
  return w.out[lane];
}

template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, int threads, size_t shared, A... args) {
  auto arguments = std::tuple<void (*)(P...), std::tuple<P...>>(kernel, std::tuple<P...>(args...));
  machine.body = [](void* p) {
    auto& call = *static_cast<decltype(arguments)*>(p);
    std::apply(std::get<0>(call), std::get<1>(call));
  };
  machine.arguments = &arguments;
  machine.shared.assign(shared / sizeof(float) + 64, 0.0f);
  block_count = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = dim3(x, y, z);
        run_block(threads);
      }
}

}  // namespace tc::simt

#define threadIdx (tc::simt::machine.fibers[tc::simt::machine.current].index)
#define blockIdx (tc::simt::block_index)
#define gridDim (tc::simt::block_count)

static inline void __syncthreads() {
  auto& m = tc::simt::machine;
  const unsigned generation = m.barrier;
  if (++m.at_barrier == m.threads) {
    m.at_barrier = 0;
    ++m.barrier;
  } else {
    while (m.barrier == generation) tc::simt::yield();
  }
}

namespace tc {

TC_DEVICE float as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
TC_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
TC_DEVICE uint32_t as_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
TC_DEVICE uint64_t double_bits(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
TC_DEVICE void report(int* error, int site) { if (*error == 0) *error = site; }

template <class V, class F> V shuffle_from(V value, const F& source) {
  static_assert(sizeof(V) <= 8, "one or two registers");
  uint32_t give[3] = {0, 0, (uint32_t)source(simt::machine.current % 32) % 32};
  memcpy(give, &value, sizeof(V));
  const uint32_t* got = simt::meet(give, 3, [](simt::Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) w.out[lane][i] = w.in[w.in[lane][2]][i];
  });
  memcpy(&value, got, sizeof(V));
  return value;
}
template <class V> V shuffle_xor(V value, int mask) { return shuffle_from(value, [mask](int lane) { return lane ^ mask; }); }
template <class V> V shuffle(V value, int lane) { return shuffle_from(value, [lane](int) { return lane & 31; }); }

template <int BYTES> void copy_async(float* to, const float* from, const float*) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
  if (reinterpret_cast<uintptr_t>(to) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES) {
    fprintf(stderr, "misaligned asynchronous copy of %d bytes\n", BYTES);
    abort();
  }
  simt::machine.fibers[simt::machine.current].groups.back().push_back({to, from, BYTES / 4});
}
TC_DEVICE void commit_copies() { simt::machine.fibers[simt::machine.current].groups.emplace_back(); }
template <int PENDING> void wait_copies() {
  auto& groups = simt::machine.fibers[simt::machine.current].groups;
  while ((int)groups.size() - 1 > PENDING) {
    for (const simt::Copy& copy : groups.front())
      for (int i = 0; i < copy.floats; ++i) copy.to[i] = copy.from ? copy.from[i] : 0.0f;
    groups.erase(groups.begin());
  }
}

TC_DEVICE uint32_t tf32(float x) {  // cvt.rna: nearest, ties away from zero
  uint32_t bits = as_bits(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
TC_DEVICE uint32_t pack_fp16(float low, float high) {
  _Float16 pair[2] = {(_Float16)low, (_Float16)high};
  uint32_t r;
  memcpy(&r, pair, 4);
  return r;
}
TC_DEVICE uint32_t bf16(float x) {
  const uint32_t bits = as_bits(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
TC_DEVICE uint32_t pack_bf16(float low, float high) { return bf16(low) | bf16(high) << 16; }

template <bool BF16> uint16_t round_half(float x) { return BF16 ? bf16(x) : (uint16_t)pack_fp16(x, 0.0f); }
template <bool BF16> float widen_half(uint16_t bits) {
  if (BF16) return as_float((uint32_t)bits << 16);
  _Float16 x;
  memcpy(&x, &bits, 2);
  return (float)x;
}

TC_DEVICE uint8_t round_float8(float x) {
  const uint32_t bits = as_bits(x), magnitude = std::min(bits & 0x7fffffffu, 0x43e00000u), sign = bits >> 24 & 0x80;
  if (x != x) return 0x7f;
  if (magnitude < 0x3c800000u) return sign | (uint32_t)nearbyintf(as_float(magnitude) * 512.0f);  // subnormal
  return sign | ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
}
TC_DEVICE float widen_float8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, digits = bits & 7;
  const float magnitude = (bits & 0x7f) == 0x7f ? NAN : ldexpf(exponent ? 8 + digits : digits, std::max(exponent, 1) - 10);
  return bits & 0x80 ? -magnitude : magnitude;
}

inline uint32_t masked_or(uint32_t word, uint32_t mask, uint32_t more) { return word & mask | more; }
template <bool BF16> uint32_t minus_pairs(uint32_t a, uint32_t b) {
  uint32_t r = 0;
  for (int half = 0; half < 2; ++half) r |= (uint32_t)round_half<BF16>(widen_half<BF16>(a >> 16 * half) - widen_half<BF16>(b >> 16 * half)) << 16 * half;
  return r;
}

TC_DEVICE void load_transposed(uint32_t (&r)[4], const float* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    fprintf(stderr, "misaligned row of a matrix\n");
    abort();
  }
  uint32_t give[2];
  memcpy(give, &row, 8);
  const uint32_t* got = simt::meet(give, 2, [](simt::Warp& w) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const uint16_t* from;
          memcpy(&from, w.in[8 * matrix + 2 * (lane % 4) + i], 8);
          pair[i] = from[lane / 4];
        }
        memcpy(&w.out[lane][matrix], pair, 4);
      }
  });
  memcpy(r, got, 16);
}

// C of a whole warp from A [16][K] and B [K][8]; registers 0..3 of a lane are C's pairs, rows g and g + 8
template <int K> void product(simt::Warp& w, const float (&a)[16][K], const float (&b)[K][8], int first_c) {
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int n = 0; n < 8; ++n) sum[n] = as_float(w.in[row % 8 * 4 + n / 2][first_c + row / 8 * 2 + n % 2]);
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) sum[n] += a[row][k] * b[k][n];
    for (int n = 0; n < 8; ++n) w.out[row % 8 * 4 + n / 2][row / 8 * 2 + n % 2] = as_bits(sum[n]);
  }
}

TC_DEVICE void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint32_t give[10] = {a0, a1, a2, a3, b0, b1};
  memcpy(give + 6, c, 16);
  const uint32_t* got = simt::meet(give, 10, [](simt::Warp& w) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      auto value = [&](int i) { return as_float(w.in[lane][i] & ~0x1fffu); };
      a[g][t] = value(0), a[g + 8][t] = value(1), a[g][t + 4] = value(2), a[g + 8][t + 4] = value(3);
      b[t][g] = value(4), b[t + 4][g] = value(5);
    }
    product<8>(w, a, b, 6);
  });
  memcpy(c, got, 16);
}

template <bool BF16> void mma_half(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint32_t give[10] = {a0, a1, a2, a3, b0, b1};
  memcpy(give + 6, c, 16);
  const uint32_t* got = simt::meet(give, 10, [](simt::Warp& w) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      auto value = [&](int i, int half) {
        return widen_half<BF16>(w.in[lane][i] >> 16 * half);
      };
      for (int half = 0; half < 2; ++half) {
        const int k = 2 * t + half;
        a[g][k] = value(0, half), a[g + 8][k] = value(1, half), a[g][k + 8] = value(2, half), a[g + 8][k + 8] = value(3, half);
        b[k][g] = value(4, half), b[k + 8][g] = value(5, half);
      }
    }
    product<16>(w, a, b, 6);
  });
  memcpy(c, got, 16);
}

template <bool BF16, int SELECTOR> void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t positions) {
  uint32_t give[13] = {a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], positions};
  memcpy(give + 9, c, 16);
  const uint32_t* got = simt::meet(give, 13, [](simt::Warp& w) {
    float full[16][32] = {}, right[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) right[2 * t + 8 * i + half][g] = widen_half<BF16>(w.in[lane][4 + i] >> 16 * half);
        for (int i = 0; i < 4; ++i) {  // the four k of number `four`: 16 of them have their positions in a lane, those of row g in its low half
          const int row = g + i % 2 * 8, four = t + i / 2 * 4;
          const uint32_t fours = w.in[4 * g + 2 * SELECTOR + four / 4][8] >> 16 * (i % 2) >> 4 * (four % 4) & 15;
          if ((fours & 3) >= fours >> 2) fprintf(stderr, "positions that do not rise\n"), abort();
          full[row][4 * four + (fours >> 2 * half & 3)] = widen_half<BF16>(w.in[lane][i] >> 16 * half);
        }
      }
    }
    product<32>(w, full, right, 9);
  });
  memcpy(c, got, 16);
}

// c + a b as tensor cores add numbers of 8 bits: all terms shifted to the largest one's power of two, 13 bits behind its point, and what is below cut off, of the sum too
// (DeepSeek-V3 technical report, 2024, section 3.3.2; Zhang et al., "SageAttention2", 2024, for sm_89).
template <int K> float sum_of_float8(float c, const float (&a)[K], const float (&b)[K]) {
  float terms[K + 1], total = c;
  for (int k = 0; k < K; ++k) total += terms[k] = a[k] * b[k];
  terms[K] = c;
  if (!std::isfinite(total)) return total;
  int top = -200;
  for (float term : terms) top = term ? std::max(top, std::ilogb(term)) : top;
  int64_t sum = 0;
  for (float term : terms) sum += (int64_t)std::ldexp((double)term, 13 - top);
  int shift = 0;
  while (std::abs(sum) >> shift >= 1 << 14) ++shift;
  return (float)std::ldexp((double)(sum / ((int64_t)1 << shift)), shift + top - 13);
}
TC_DEVICE void mma_e4m3(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint32_t give[10] = {a0, a1, a2, a3, b0, b1};
  memcpy(give + 6, c, 16);
  const uint32_t* got = simt::meet(give, 10, [](simt::Warp& w) {
    float a[16][32], b[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int byte = 0; byte < 4; ++byte) {
        auto value = [&](int i) { return widen_float8(w.in[lane][i] >> 8 * byte); };
        const int k = 4 * t + byte;
        a[g][k] = value(0), a[g + 8][k] = value(1), a[g][k + 16] = value(2), a[g + 8][k + 16] = value(3);
        b[g][k] = value(4), b[g][k + 16] = value(5);
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int n = 0; n < 8; ++n) {
        const int lane = row % 8 * 4 + n / 2, place = row / 8 * 2 + n % 2;
        w.out[lane][place] = as_bits(sum_of_float8(as_float(w.in[lane][6 + place]), a[row], b[n]));
      }
  });
  memcpy(c, got, 16);
}

// A: uint8_t or int8_t
template <class A> void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint32_t give[10] = {a0, a1, a2, a3, b0, b1};
  memcpy(give + 6, c, 16);
  const uint32_t* got = simt::meet(give, 10, [](simt::Warp& w) {
    A a[16][32];
    int8_t b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int byte = 0; byte < 4; ++byte) {
        auto value = [&](int i) { return w.in[lane][i] >> 8 * byte & 0xff; };
        const int k = 4 * t + byte;
        a[g][k] = (A)value(0), a[g + 8][k] = (A)value(1), a[g][k + 16] = (A)value(2), a[g + 8][k + 16] = (A)value(3);
        b[k][g] = (int8_t)value(4), b[k + 16][g] = (int8_t)value(5);
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int n = 0; n < 8; ++n) {
        const int lane = row % 8 * 4 + n / 2, place = row / 8 * 2 + n % 2;
        uint32_t sum = w.in[lane][6 + place];
        for (int k = 0; k < 32; ++k) sum += (uint32_t)(a[row][k] * b[k][n]);
        w.out[lane][place] = sum;
      }
  });
  memcpy(c, got, 16);
}
TC_DEVICE void mma_u8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_bytes<uint8_t>(c, a0, a1, a2, a3, b0, b1); }
TC_DEVICE void mma_s8s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_bytes<int8_t>(c, a0, a1, a2, a3, b0, b1); }

}  // namespace tc
