// Device code shared by all kernels that tcompile emits: copies into shared memory, tensor-core products, GEMM, reductions.
//
// The same source compiles for a CPU with TCOMPILE_SIMT defined: simt.h then plays the machine, one fiber per thread, so that kernels can be checked without a GPU.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef TCOMPILE_SIMT
#include "simt.h"
#else
#include "device.cuh"
#endif

namespace tc {

// A size that the host computes while the model runs, with what replaces divisions by it: the quotient of n < 2^31 is the upper part of n times `factor`, rounded up
// (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994).
struct Size {
  int value;
  uint32_t factor, shift;
  Size() = default;
  explicit Size(int64_t size) : value((int)size), shift(0) {
    const uint64_t divisor = size > 1 ? (uint64_t)size : 1;
    while (divisor > (uint64_t)1 << shift) ++shift;
    factor = (uint32_t)((((uint64_t)1 << (31 + shift)) + divisor - 1) / divisor);
  }
  TC_DEVICE operator int() const { return value; }
};
// for n >= 0
template <class T> TC_DEVICE int operator/(T n, const Size& size) { return (int)(multiply_high((uint32_t)n << 1, size.factor) >> size.shift); }
template <class T> TC_DEVICE int operator%(T n, const Size& size) { return (int)n - n / size * size.value; }

// ---- scalars -------------------------------------------------------------------------------------------------------------------------------------
template <class T> TC_DEVICE T max(T a, T b) { return a > b || a != a ? a : b; }  // keeps a NaN, as onnxruntime does
template <class T> TC_DEVICE T min(T a, T b) { return a < b || a != a ? a : b; }
template <class T> TC_DEVICE T truncdiv(T a, T b) { return b == -1 ? T(0) - a : a / b; }  // the least number over -1 wraps around
template <class T> TC_DEVICE T truncmod(T a, T b) { return b == -1 ? 0 : a % b; }
template <class T> TC_DEVICE T floordiv(T a, T b) {
  const T r = truncmod(a, b);
  return truncdiv(a, b) - (r != 0 && (r < 0) != (b < 0));
}
template <class T> TC_DEVICE T floormod(T a, T b) {
  const T r = truncmod(a, b);
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
template <class T> TC_DEVICE bool is_nan(T x) { return x != x; }
template <class T> TC_DEVICE bool is_infinite(T x) { return x == x && x - x != x - x; }
template <class T> TC_DEVICE bool is_finite(T x) { return x - x == x - x; }
template <class To, class From> TC_DEVICE To bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "the same bits as another type");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class T> TC_DEVICE T absolute(T x) { return x < 0 ? T(0) - x : x; }

// Numbers of 16 bits, and of 8, as memory holds them; arithmetic is in float.
template <bool BF16> struct Short {
  uint16_t bits;
  Short() = default;
  TC_DEVICE Short(float x) : bits(round_half<BF16>(x)) {}
  TC_DEVICE operator float() const { return widen_half<BF16>(bits); }
};
using float16 = Short<false>;
using bfloat16 = Short<true>;
struct float8 {  // e4m3: to nearest, ties to even, saturating at 448
  uint8_t bits;
  float8() = default;
  TC_DEVICE float8(float x) : bits(round_float8(x)) {}
  TC_DEVICE operator float() const { return widen_float8(bits); }
};

TC_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Sine (quadrant 0) or cosine (quadrant 1), 2 ulp for |x| < 2^40: reduced in double, since CUDA's own reduction of large arguments takes local memory.
TC_DEVICE float turn(float x, int quadrant) {
  const double n = rint((double)x * 0.63661977236758134), reduced = fma(n, -6.123233995736766e-17, fma(n, -1.5707963267948966, (double)x));
  const long long q = (long long)n + quadrant;
  const float r = (float)reduced, r2 = r * r;
  const float sine = r + r * r2 * (-0.1666665467846208f + r2 * (0.008332165757588623f + r2 * -0.00019515952804988884f));
  const float cosine = 1.0f - 0.5f * r2 + r2 * r2 * (0.041666646236693014f + r2 * (-0.001388734148653151f + r2 * 2.443585173557514e-05f));
  const float value = q & 1 ? cosine : sine;
  return q & 2 ? -value : value;
}
TC_DEVICE float sine(float x) { return turn(x, 0); }
TC_DEVICE float cosine(float x) { return turn(x, 1); }

// An index that data decides: negative ones count from the end; one out of range is recorded (the first 1-based site wins) and replaced by 0.
TC_DEVICE int index(long long i, int extent, int* error, int site) {
  if (i < 0) i += extent;
  if (i >= 0 && i < extent) return (int)i;
  report(error, site);
  return 0;
}

template <class T> TC_DEVICE T divisor(T value, int* error, int site) {
  if (value == 0) report(error, site);
  return value == 0 ? T(1) : value;
}

// ---- number policies: how pairs of fp32 values become operands of a tensor-core product --------------------------------------------------------------
// One step multiplies a 16 x 16 tile of A with a 16 x 8 tile of B. Lane l has g = l / 4, t = l % 4. It gives A's pairs (row g | g + 8, k = 8 s + 2 t and
// the next) and B's (the same k, column g) for s = 0, 1; it receives C's pairs (row g | g + 8, columns 2 t and the next).
// m16n8k8 wants k = t and t + 4 in a lane; which k is called which is free as long as A and B agree, so the pair (2 t, 2 t + 1) goes there.
struct alignas(8) Pair { float x, y; };
TC_DEVICE Pair pair(const float* p) { return *reinterpret_cast<const Pair*>(p); }

// Operands of a word per value: Mma says how a value becomes a word, and multiplies 8 words of k. BLOCKED: every k block is summed apart.
template <class Mma, bool BLOCKED = false> struct Words {
  using Sum = typename Mma::Sum;
  static constexpr bool blocked = BLOCKED;
  struct A { uint32_t r[8]; };
  struct B { uint32_t r[4]; };
  static TC_DEVICE A a(Pair g0, Pair h0, Pair g1, Pair h1) {
    return {{Mma::word(g0.x), Mma::word(h0.x), Mma::word(g0.y), Mma::word(h0.y), Mma::word(g1.x), Mma::word(h1.x), Mma::word(g1.y), Mma::word(h1.y)}};
  }
  static TC_DEVICE B b(Pair k0, Pair k1) { return {{Mma::word(k0.x), Mma::word(k0.y), Mma::word(k1.x), Mma::word(k1.y)}}; }
  static TC_DEVICE void mma(Sum (&c)[4], const A& a, const B& b) {
    Mma::mma(c, a.r[0], a.r[1], a.r[2], a.r[3], b.r[0], b.r[1]);
    Mma::mma(c, a.r[4], a.r[5], a.r[6], a.r[7], b.r[2], b.r[3]);
  }
};

struct MmaTf32 {  // inputs rounded to 11 significant bits, sums in fp32
  using Sum = float;
  static TC_DEVICE uint32_t word(float x) { return tf32(x); }
  static TC_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_tf32(c, a0, a1, a2, a3, b0, b1); }
};
using Tf32 = Words<MmaTf32>;

struct MmaU8S8 {  // four bytes of consecutive k lie in a word, in memory already; sums are exact
  using Sum = int;
  static TC_DEVICE uint32_t word(float x) { return as_bits(x); }
  static TC_DEVICE void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_u8s8(c, a0, a1, a2, a3, b0, b1); }
};
using U8S8 = Words<MmaU8S8>;

template <bool BF16> struct MmaHalf {  // two numbers of consecutive k lie in a word, in memory already; products are exact, sums in fp32
  using Sum = float;
  static TC_DEVICE uint32_t word(float x) { return as_bits(x); }
  static TC_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_half<BF16>(c, a0, a1, a2, a3, b0, b1); }
};
using Fp16x2 = Words<MmaHalf<false>>;
using Bf16x2 = Words<MmaHalf<true>>;

struct MmaE4m3 {  // four numbers of float8 lie in a word, in memory already; products are exact
  using Sum = float;
  static TC_DEVICE uint32_t word(float x) { return as_bits(x); }
  static TC_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) { mma_e4m3(c, a0, a1, a2, a3, b0, b1); }
};
using E4m3x4 = Words<MmaE4m3, true>;  // the tensor cores' sums of them have about 14 bits: those of a block of 128 are added up in fp32

struct Fp32 {  // 3xTF32: x = big + small, products big*big + big*small + small*big: fp32's accuracy on tensor cores
  using Sum = float;
  static constexpr bool blocked = true;  // every k block is summed apart: the tensor core truncates its sums
  struct A { uint32_t big[8], small[8]; };
  struct B { uint32_t big[4], small[4]; };
  static TC_DEVICE void split(float x, uint32_t& big, uint32_t& small) {
    big = tf32(x);
    float rest = x - as_float(big);
    small = tf32(rest == rest ? rest : 0.0f);  // inf - inf: the big part says it all
  }
  static TC_DEVICE A a(Pair g0, Pair h0, Pair g1, Pair h1) {
    A f;
    const float v[8] = {g0.x, h0.x, g0.y, h0.y, g1.x, h1.x, g1.y, h1.y};
#pragma unroll
    for (int i = 0; i < 8; ++i) split(v[i], f.big[i], f.small[i]);
    return f;
  }
  static TC_DEVICE B b(Pair k0, Pair k1) {
    B f;
    const float v[4] = {k0.x, k0.y, k1.x, k1.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) split(v[i], f.big[i], f.small[i]);
    return f;
  }
  static TC_DEVICE void mma(float (&c)[4], const A& a, const B& b) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t *ab = a.big + 4 * s, *as = a.small + 4 * s, *bb = b.big + 2 * s, *bs = b.small + 2 * s;
      mma_tf32(c, as[0], as[1], as[2], as[3], bb[0], bb[1]);
      mma_tf32(c, ab[0], ab[1], ab[2], ab[3], bs[0], bs[1]);
      mma_tf32(c, ab[0], ab[1], ab[2], ab[3], bb[0], bb[1]);
    }
  }
};

template <bool BF16> struct Half {  // inputs rounded to fp16 (11 significant bits, up to 65504) or bf16 (8 bits), sums in fp32
  using Sum = float;
  static constexpr bool blocked = false;
  struct A { uint32_t r[4]; };
  struct B { uint32_t r[2]; };
  static TC_DEVICE uint32_t pack(Pair p) { return BF16 ? pack_bf16(p.x, p.y) : pack_fp16(p.x, p.y); }
  static TC_DEVICE A a(Pair g0, Pair h0, Pair g1, Pair h1) { return {{pack(g0), pack(h0), pack(g1), pack(h1)}}; }
  static TC_DEVICE B b(Pair k0, Pair k1) { return {{pack(k0), pack(k1)}}; }
  static TC_DEVICE void mma(float (&c)[4], const A& a, const B& b) { mma_half<BF16>(c, a.r[0], a.r[1], a.r[2], a.r[3], b.r[0], b.r[1]); }
};
using Fp16 = Half<false>;
using Bf16 = Half<true>;

// ---- operands ----------------------------------------------------------------------------------------------------------------------------------------
// A source gives the address of its element (r, c), or null outside of it, where zeros are read. Elements are floats, or words of shorter numbers, which are
// copied as floats are.
TC_DEVICE const float* words(const void* data) { return static_cast<const float*>(data); }

template <int ROWS, int COLS, int STRIDE = COLS> struct Matrix {  // row-major, rows STRIDE apart
  const float* data;
  TC_DEVICE const float* at(int r, int c) const { return r < ROWS && c < COLS ? data + (size_t)r * STRIDE + c : nullptr; }
};

struct OpenMatrix {  // of sizes that are known while running; distance: from row to row
  const float* data;
  int rows, columns, distance;
  TC_DEVICE const float* at(int r, int c) const { return r < rows && c < columns ? data + (size_t)r * distance + c : nullptr; }
};

// Convolution as a product: row = output pixel (n, oh, ow), column = (kh, kw, c) of the window, over an NHWC image of PIXEL channels, of which C count. Nothing is copied to get there.
template <int N, int H, int W, int C, int OH, int OW, int KH, int KW, int SH, int SW, int TOP, int LEFT, int DH, int DW, int PIXEL = C> struct Windows {
  const float* data;
  TC_DEVICE const float* at(int r, int c) const {
    const int tap = c / C, channel = c % C;
    const int h = r / OW % OH * SH + tap / KW * DH - TOP, w = r % OW * SW + tap % KW * DW - LEFT, n = r / (OW * OH);
    const bool inside = n < N && tap < KH * KW && (unsigned)h < (unsigned)H && (unsigned)w < (unsigned)W;
    return inside ? data + ((size_t)(n * H + h) * W + w) * PIXEL + channel : nullptr;
  }
};

// The same for images whose number or extent is known while running; N.. are int or Size.
template <int C, int KH, int KW, int SH, int SW, int TOP, int LEFT, int DH, int DW, int PIXEL, class N, class H, class W, class OH, class OW> struct OpenWindows {
  const float* data;
  N images;
  H height;
  W width;
  OH out_height;
  OW out_width;
  TC_DEVICE const float* at(int r, int c) const {
    const int tap = c / C, channel = c % C, line = r / out_width;
    const int h = line % out_height * SH + tap / KW * DH - TOP, w = r % out_width * SW + tap % KW * DW - LEFT, n = line / out_height;
    const bool inside = n < images && tap < KH * KW && (unsigned)h < (unsigned)height && (unsigned)w < (unsigned)width;
    return inside ? data + ((size_t)(n * height + h) * width + w) * PIXEL + channel : nullptr;
  }
};

// Copies rows r0.. x columns c0.. of a source into shared memory, VEC floats at a time, asynchronously.
template <int ROWS, int COLS, int STRIDE, int THREADS, int VEC, class Source> TC_DEVICE void stage(float* to, const Source& from, int r0, int c0) {
  constexpr int PER_ROW = COLS / VEC;
#pragma unroll
  for (int first = 0; first < ROWS * PER_ROW; first += THREADS) {
    const int i = first + (int)threadIdx.x, row = i / PER_ROW, column = i % PER_ROW * VEC;
    if (ROWS * PER_ROW % THREADS == 0 || i < ROWS * PER_ROW) copy_async<VEC * 4>(to + row * STRIDE + column, from.at(r0 + row, c0 + column), from.data);
  }
}

// ---- GEMM --------------------------------------------------------------------------------------------------------------------------------------------
// A block makes BM x BN of C with WM x WN warps; STAGES tiles of A [BM][BK] and B [BK][BN] are in flight. The padding of their rows (8 and 4 floats) puts the 32
// lanes of every fragment load into different banks.
template <int BM_, int BN_, int WM_, int WN_, int STAGES_> struct Tile {
  static constexpr int BM = BM_, BN = BN_, BK = 32, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int THREADS = 32 * WM * WN, LDA = BK + 8, LDB = BN + 4;
  static constexpr int A_FLOATS = BM * LDA, STAGE_FLOATS = A_FLOATS + BK * LDB;
  static constexpr int MT = BM / WM / 16, NT = BN / WN / 8;
  static_assert(BM % (WM * 16) == 0 && BN % (WN * 8) == 0 && BN % 16 == 0, "tiles of whole fragments");
};

// Where results go: neighbours in a row that begins at an even place are written together.
template <class V> struct alignas(2 * sizeof(V)) Two { V x, y; };
template <class V, class Rounded = void> struct To {  // in two types
  V* data;
  Rounded* rounded;
  TC_DEVICE void one(size_t at, V x) const { data[at] = x, rounded[at] = x; }
  TC_DEVICE void two(size_t at, V x, V y) const {
    *reinterpret_cast<Two<V>*>(data + at) = {x, y};
    *reinterpret_cast<Two<Rounded>*>(rounded + at) = {x, y};
  }
};
template <class V> struct To<V, void> {
  V* data;
  TC_DEVICE void one(size_t at, V x) const { data[at] = x; }
  TC_DEVICE void two(size_t at, V x, V y) const { *reinterpret_cast<Two<V>*>(data + at) = {x, y}; }
};
// columns: of the row, before the next one begins `distance` further.
template <class Out, class Value> TC_DEVICE void put(const Out& out, size_t row, int column, int columns, int distance, const Value& value) {
  if (columns % 2 == 0 && distance % 2 == 0) {
    if (column < columns) out.two(row + column, value(0), value(1));
  } else {
    if (column < columns) out.one(row + column, value(0));
    if (column + 1 < columns) out.one(row + column + 1, value(1));
  }
}
template <int COLUMNS, int DISTANCE = COLUMNS, class Out, class Value> TC_DEVICE void put(const Out& out, size_t row, int column, const Value& value) {
  put(out, row, column, COLUMNS, DISTANCE, value);
}

// use(step) for every step in its order; fill(step) asks for its copies, STAGES - 1 steps ahead.
template <int STAGES, class Fill, class Use> TC_DEVICE void in_stages(int steps, const Fill& fill, const Use& use) {
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) fill(step);
    commit_copies();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps) fill(step + STAGES - 1);
    commit_copies();
    use(step);
  }
}

// Where the sums of a thread lie in a tile.
template <class T> struct Place {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wm = warp / T::WN * (T::MT * 16), wn = warp % T::WN * (T::NT * 8);
};
// c += A B of so many steps of BK of K, in their order: bring(a, b, step) asks for the copies of a step's tiles of A and B.
template <class P, class T, class Bring> TC_DEVICE void gemm_sums(const Place<T>& at, int steps, const Bring& bring, typename P::Sum (&c)[T::MT][T::NT][4]) {
  TC_SHARED(float, shared);
  const int g = at.g, t = at.t, wm = at.wm, wn = at.wn;
  auto fill = [&](int step) {
    float* slot = shared + step % T::STAGES * T::STAGE_FLOATS;
    bring(slot, slot + T::A_FLOATS, step);
  };
  in_stages<T::STAGES>(steps, fill, [&](int step) {
    const float* as = shared + step % T::STAGES * T::STAGE_FLOATS;
    const float* bs = as + T::A_FLOATS;
    typename P::Sum block[T::MT][T::NT][4] = {};
#pragma unroll
    for (int k = 0; k < T::BK; k += 16) {
      typename P::A fa[T::MT];
#pragma unroll
      for (int i = 0; i < T::MT; ++i) {
        const float* p = as + (wm + i * 16 + g) * T::LDA + k + 2 * t;
        fa[i] = P::a(pair(p), pair(p + 8 * T::LDA), pair(p + 8), pair(p + 8 * T::LDA + 8));
      }
#pragma unroll
      for (int j = 0; j < T::NT; ++j) {
        const float* p = bs + (k + 2 * t) * T::LDB + wn + j * 8 + g;
        const typename P::B fb = P::b({p[0], p[T::LDB]}, {p[8 * T::LDB], p[9 * T::LDB]});
#pragma unroll
        for (int i = 0; i < T::MT; ++i) P::mma(P::blocked ? block[i][j] : c[i][j], fa[i], fb);
      }
    }
    if (P::blocked) {
#pragma unroll
      for (int i = 0; i < T::MT; ++i)
#pragma unroll
        for (int j = 0; j < T::NT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[i][j][e] += block[i][j][e];
    }
  });
}
// out[m0.., n0..] [rows][columns] = value(row, column, sum) for the sums of a tile. distance: from row to row of out.
template <class P, class T, class Out, class Value>
TC_DEVICE void gemm_store(const Place<T>& at, const typename P::Sum (&c)[T::MT][T::NT][4], const Out& out, int rows, int columns, int distance, int m0, int n0, const Value& value) {
#pragma unroll
  for (int i = 0; i < T::MT; ++i)
#pragma unroll
    for (int j = 0; j < T::NT; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int m = m0 + at.wm + i * 16 + at.g + r * 8, n = n0 + at.wn + j * 8 + 2 * at.t;
        if (m < rows) put(out, (size_t)m * distance, n, columns, distance, [&](int e) { return value(m, n + e, c[i][j][2 * r + e]); });
      }
}
// Both.
template <class P, class T, class Bring, class Out, class Value>
TC_DEVICE void gemm_steps(int steps, const Bring& bring, const Out& out, int rows, int columns, int distance, int m0, int n0, const Value& value) {
  const Place<T> at;
  typename P::Sum c[T::MT][T::NT][4] = {};
  gemm_sums<P, T>(at, steps, bring, c);
  gemm_store<P, T>(at, c, out, rows, columns, distance, m0, n0, value);
}
// The same where A is rows x depth and B is depth x columns, both from k0 on. VA, VB: floats per copy.
template <class P, class T, int VA, int VB, class SourceA, class SourceB, class Out, class Value>
TC_DEVICE void gemm(const SourceA& a, const SourceB& b, const Out& out, int rows, int columns, int depth, int distance, int m0, int n0, int k0, const Value& value) {
  auto bring = [&](float* as, float* bs, int step) {
    stage<T::BM, T::BK, T::LDA, T::THREADS, VA>(as, a, m0, k0 + step * T::BK);
    stage<T::BK, T::BN, T::LDB, T::THREADS, VB>(bs, b, k0 + step * T::BK, n0);
  };
  gemm_steps<P, T>((depth + T::BK - 1) / T::BK, bring, out, rows, columns, distance, m0, n0, value);
}
// The same for sizes that are known.
template <class P, class T, int M, int N, int K, int VA, int VB, int LD = N, class SourceA, class SourceB, class Out, class Value>
TC_DEVICE void gemm(const SourceA& a, const SourceB& b, const Out& out, int m0, int n0, int k0, const Value& value) {
  gemm<P, T, VA, VB>(a, b, out, M, N, K, LD, m0, n0, k0, value);
}

// ---- reductions --------------------------------------------------------------------------------------------------------------------------------------
// Folds one value per thread over the WIDTH threads of a row (a power of two up to 32, or all threads of the block); everyone gets the result.
template <int WIDTH, class V, class F> TC_DEVICE V fold(V value, const F& combine) {
#pragma unroll
  for (int step = (WIDTH < 32 ? WIDTH : 32) / 2; step > 0; step /= 2) value = combine(value, shuffle_xor(value, step));
  if (WIDTH > 32) {
    TC_SHARED(V, partial);
    __syncthreads();  // a fold before this one may still be read
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    value = partial[0];
#pragma unroll
    for (int warp = 1; warp < WIDTH / 32; ++warp) value = combine(value, partial[warp]);
  }
  return value;
}

// Folds one value per thread over the WARPS warps of a block, lane by lane: 32 rows, each of which has a lane of every warp.
template <int WARPS, class V, class F> TC_DEVICE V fold_across(V value, const F& combine) {
  TC_SHARED(V, partial);
  __syncthreads();  // a fold before this one may still be read
  partial[threadIdx.x] = value;
  __syncthreads();
  value = partial[threadIdx.x % 32];
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) value = combine(value, partial[warp * 32 + threadIdx.x % 32]);
  return value;
}

}  // namespace tc
