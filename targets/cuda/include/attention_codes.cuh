// Attention over keys and values that are codes of 8 or 4 bits: key = (code - zero) * scale, and so a value.
//
// Codes come into shared memory as they lie in memory and become pairs of 16-bit floats in registers, by masks (see `Codes`). Differences of codes and zeros are integers that
// bf16 and fp16 hold exactly, and queries and probabilities are in as many parts as the precision asks for, so codes are never rounded. Scales of keys multiply scores, those of
// values probabilities, in fp32.
//
// Few rows (the queries of all heads that share keys): warps take keys in turns, and what they made is joined in shared memory. Many: 16 rows a warp.
#pragma once
#include "attention.cuh"
#include "weight_only.cuh"

namespace tc {

// BITS of a code; SIGNED: bytes of two's complement. ZERO: the code that stands for 0, counted from the least code on; -1: each key has its own. SCALES: each key has one.
template <int BITS_, bool SIGNED, int ZERO_, bool SCALES_> struct Side {
  static constexpr int BITS = BITS_, ZERO = ZERO_, PER_WORD = 32 / BITS;
  static constexpr bool SCALES = SCALES_;
  static constexpr uint32_t FLIP = SIGNED ? 0x80808080u : 0u;  // to codes from the least one on
};

// (code - zero) as numbers of 16 bits, of codes at bits 0 and 16; zeros: as `zero_pair` makes them
template <class S, bool BF16> TC_DEVICE uint32_t differences(uint32_t codes, uint32_t zeros) {
  using C = Codes<S::BITS, BF16>;
  if (S::BITS == 8 && BF16) {
    const uint32_t centred = C::signed_bytes(codes ^ 0x00800080u);
    return S::ZERO == 128 ? centred : minus_pairs<true>(centred, zeros);
  }
  return minus_pairs<BF16>(codes & (S::BITS == 4 ? 0x000f000fu : 0x00ff00ffu) | C::BASE, zeros);
}
template <class S, bool BF16> TC_DEVICE uint32_t zero_pair(uint32_t low, uint32_t high) {
  using C = Codes<S::BITS, BF16>;
  const uint32_t both = low | high << 16;
  return S::BITS == 8 && BF16 ? C::signed_bytes(both ^ 0x00800080u) : both | C::BASE;
}

// D, E: elements of a key and of a value. WARPS_OF_ROWS of the four warps have 16 rows each, the others take turns at keys; BW: keys of a warp and step.
template <class KS_, class VS_, class A_, int D_, int E_, int WARPS_OF_ROWS, int BW_> struct Cache {
  using KS = KS_;
  using VS = VS_;
  using A = A_;
  static constexpr int D = D_, E = E_, RW = WARPS_OF_ROWS, KW = 4 / RW, BQ = 16 * RW, BW = BW_, BT = BW * KW, THREADS = 128;
  static constexpr int STEPS = (D + 4 * KS::PER_WORD - 1) / (4 * KS::PER_WORD) * (KS::PER_WORD / 4);  // of 16 d
  static constexpr int K_WORDS = STEPS * 16 / KS::PER_WORD, STRIPS = (E + 8 * VS::PER_WORD - 1) / (8 * VS::PER_WORD), V_WORDS = STRIPS * 8;
  // rows begin in banks that are 4 apart
  static constexpr int LDK = K_WORDS % 8 == 4 ? K_WORDS : K_WORDS + 4, LDV = V_WORDS + 4;
  static constexpr int K_FLOATS = BT * LDK, V_FLOATS = BT * LDV, STAGE_FLOATS = K_FLOATS + V_FLOATS + BT * (KS::SCALES + VS::SCALES);
  static constexpr int Q_WORDS = RW * STEPS * A::PARTS * 128, TILES = STRIPS * VS::PER_WORD, LDO = E + 2;
};

// What each key has one of; nothing where a side has none.
struct Tokens {
  const float *k_scales, *v_scales;
  const unsigned char *k_zeros, *v_zeros;
};

// Rows q0 .. of q [rows][D] to rows of `out`, `stride` elements apart; keys, values and what belongs to tokens are those of one head. score(row, t, x): the masked, scaled score of a
// row and key t whose product is x. PARTED: `part` steps of keys from `first` on are taken, and rows are E sums, the largest score and the sum of probabilities, for `joined`.
template <class T, bool SAFE, bool PARTED, int VK, int VV, class K, class V, class Out, class Score>
TC_DEVICE void attention_codes(const float* q, const K& k, const V& v, const Tokens& tokens, const Out& out, int rows, int keys, int stride, int part, int q0, int first, const Score& score) {
  using A = typename T::A;
  using KS = typename T::KS;
  using VS = typename T::VS;
  constexpr bool BF16 = A::BF16;
  constexpr int PARTS = A::PARTS;
  struct alignas(16) Fragment { uint32_t r[4]; };
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int own = warp / T::KW * 16, turn = warp % T::KW;  // the warp's rows, and keys
  Fragment* const fragments = reinterpret_cast<Fragment*>(shared) + warp / T::KW * (T::STEPS * PARTS * 32);
  float* const stages = shared + T::Q_WORDS;
  const int all = (keys + T::BT - 1) / T::BT, end = PARTED ? tc::min(all, first + part) : all;
  auto fill = [&](int step) {
    float* slot = stages + step % 2 * T::STAGE_FLOATS;
    stage<T::BT, T::K_WORDS, T::LDK, T::THREADS, VK>(slot, k, step * T::BT, 0);
    stage<T::BT, T::V_WORDS, T::LDV, T::THREADS, VV>(slot + T::K_FLOATS, v, step * T::BT, 0);
    const int key = step * T::BT + (int)threadIdx.x;
    if (threadIdx.x < T::BT) {
      float* scales = slot + T::K_FLOATS + T::V_FLOATS + threadIdx.x;
      if (KS::SCALES) copy_async<4>(scales, key < keys ? tokens.k_scales + key : nullptr, tokens.k_scales);
      if (VS::SCALES) copy_async<4>(scales + T::BT * KS::SCALES, key < keys ? tokens.v_scales + key : nullptr, tokens.v_scales);
    }
  };
  fill(first);
  commit_copies();
#pragma unroll 1
  for (int step = turn; step < T::STEPS; step += T::KW) {  // queries as fragments: a lane has a word of a key, so these elements
    constexpr int HALF = KS::PER_WORD / 2;
    const int d = step / (KS::PER_WORD / 4) * 4 * KS::PER_WORD + t * KS::PER_WORD + step % (KS::PER_WORD / 4) * 2;
    Fragment made[PARTS];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = q0 + own + g + 8 * r;
      auto element = [&](int i) { return row < rows && d + i < T::D ? q[(size_t)row * T::D + d + i] : 0.0f; };
      const float four[4] = {element(0), element(HALF), element(1), element(HALF + 1)};
      uint32_t pairs[PARTS][2];
      A::parts(pairs, four);
#pragma unroll
      for (int i = 0; i < PARTS; ++i) made[i].r[r] = pairs[i][0], made[i].r[2 + r] = pairs[i][1];
    }
#pragma unroll
    for (int i = 0; i < PARTS; ++i) fragments[(step * PARTS + i) * 32 + lane] = made[i];
  }
  float sums[T::TILES][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int step = first; step < end; ++step) {
    wait_copies<0>();
    __syncthreads();
    if (step + 1 < end) fill(step + 1);
    commit_copies();
    if (q0 + own >= rows) continue;
    const float* slot = stages + step % 2 * T::STAGE_FLOATS;
    const float* ks = slot + turn * T::BW * T::LDK;
    const float* vs = slot + T::K_FLOATS + turn * T::BW * T::LDV;
    const float* scales = slot + T::K_FLOATS + T::V_FLOATS + turn * T::BW;
    const int base_key = step * T::BT + turn * T::BW;
    auto zero = [&](const unsigned char* zeros, int key, uint32_t flip) { return key < keys ? (uint32_t)zeros[key] ^ (flip & 0xffu) : 0u; };
    float s[T::BW / 8][4] = {};
    uint32_t zeros[T::BW / 8];
#pragma unroll
    for (int j = 0; j < T::BW / 8; ++j) {
      const uint32_t z = KS::ZERO < 0 ? zero(tokens.k_zeros, base_key + j * 8 + g, KS::FLIP) : (uint32_t)KS::ZERO;
      zeros[j] = zero_pair<KS, BF16>(z, z);
    }
#pragma unroll
    for (int word = 0; word < T::K_WORDS / 4; ++word) {
      uint32_t codes[T::BW / 8];
#pragma unroll
      for (int j = 0; j < T::BW / 8; ++j) codes[j] = as_bits(ks[(j * 8 + g) * T::LDK + 4 * word + t]) ^ KS::FLIP;
#pragma unroll
      for (int m = 0; m < KS::PER_WORD / 4; ++m) {
        Fragment a[PARTS];
#pragma unroll
        for (int i = 0; i < PARTS; ++i) a[i] = fragments[((word * (KS::PER_WORD / 4) + m) * PARTS + i) * 32 + lane];
#pragma unroll
        for (int j = 0; j < T::BW / 8; ++j) {
          const uint32_t b0 = differences<KS, BF16>(codes[j] >> KS::BITS * (2 * m), zeros[j]), b1 = differences<KS, BF16>(codes[j] >> KS::BITS * (2 * m + 1), zeros[j]);
#pragma unroll
          for (int i = PARTS - 1; i >= 0; --i) mma_half<BF16>(s[j], a[i].r[0], a[i].r[1], a[i].r[2], a[i].r[3], b0, b1);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows g and g + 8 of the warp, spread over its four lanes t
      const int row = q0 + own + g + r * 8;
      float high = top[r];
#pragma unroll
      for (int j = 0; j < T::BW / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = j * 8 + 2 * t + e, key = base_key + at;
          float& x = s[j][r * 2 + e];
          x = row < rows && key < keys ? score(row, key, KS::SCALES ? x * scales[at] : x) : -INFINITY;
          high = tc::max(high, x);
        }
      high = row_max(high, tc::max<float>);
      const float base = high == -INFINITY ? 0.0f : high, old = expf(top[r] - base);
      top[r] = high;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < T::BW / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][r * 2 + e];
          x = expf(x - base);
          sum += x;
          if (VS::SCALES) x *= scales[T::BT * KS::SCALES + j * 8 + 2 * t + e];
        }
      total[r] = total[r] * old + sum;
#pragma unroll
      for (int j = 0; j < T::TILES; ++j) {
        sums[j][r * 2] *= old;
        sums[j][r * 2 + 1] *= old;
      }
    }
#pragma unroll
    for (int i = 0; i < T::BW / 16; ++i) {  // the scores' registers are those of an A operand: columns of C are k of the next product
      Fragment p[PARTS];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t pairs[PARTS][2];
        A::parts(pairs, s[2 * i + h]);
#pragma unroll
        for (int part = 0; part < PARTS; ++part) p[part].r[2 * h] = pairs[part][0], p[part].r[2 * h + 1] = pairs[part][1];
      }
      uint32_t z[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int key = base_key + i * 16 + h * 8 + 2 * t;
        const uint32_t low = VS::ZERO < 0 ? zero(tokens.v_zeros, key, VS::FLIP) : (uint32_t)VS::ZERO;
        z[h] = zero_pair<VS, BF16>(low, VS::ZERO < 0 ? zero(tokens.v_zeros, key + 1, VS::FLIP) : low);
      }
#pragma unroll
      for (int strip = 0; strip < T::STRIPS; ++strip) {  // lane g has a word of a strip's values: column g of tile c is element c of that word
        uint32_t low[2], high[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* p0 = vs + (i * 16 + h * 8 + 2 * t) * T::LDV + strip * 8 + g;
          const uint32_t w0 = as_bits(p0[0]) ^ VS::FLIP, w1 = as_bits(p0[T::LDV]) ^ VS::FLIP;
          low[h] = w0 & 0xffffu | w1 << 16;
          high[h] = w0 >> 16 | w1 & 0xffff0000u;
        }
#pragma unroll
        for (int c = 0; c < VS::PER_WORD; ++c) {
          const int shift = VS::BITS * (c % (VS::PER_WORD / 2));
          const uint32_t(&from)[2] = c < VS::PER_WORD / 2 ? low : high;
          const uint32_t b0 = differences<VS, BF16>(from[0] >> shift, z[0]), b1 = differences<VS, BF16>(from[1] >> shift, z[1]);
#pragma unroll
          for (int part = PARTS - 1; part >= 0; --part) mma_half<BF16>(sums[strip * VS::PER_WORD + c], p[part].r[0], p[part].r[1], p[part].r[2], p[part].r[3], b0, b1);
        }
      }
    }
  }
  // element (strip, 2 t + c, i) of a row
  auto each = [&](const auto& use) {
#pragma unroll
    for (int strip = 0; strip < T::STRIPS; ++strip)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int i = 0; i < VS::PER_WORD; i += 2) use((strip * 8 + 2 * t + c) * VS::PER_WORD + i, strip * VS::PER_WORD + i, c);
  };
  if (T::KW == 1) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(total[r]), factor = PARTED ? 1.0f : normalizer<SAFE>(sum);
      const int row = q0 + own + g + r * 8;
      if (row >= rows) continue;
      const size_t at = (size_t)row * stride;
      each([&](int column, int tile, int c) { put<T::E>(out, at, column, [&](int e) { return sums[tile + e][r * 2 + c] * factor; }); });
      if (PARTED && t == 0) {
        out.one(at + T::E, top[r]);
        out.one(at + T::E + 1, sum);
      }
    }
    return;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(total[r]);
    float* row = shared + (warp * 16 + g + r * 8) * T::LDO;
    each([&](int column, int tile, int c) {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e < T::E) row[column + e] = sums[tile + e][r * 2 + c];
    });
    if (t == 0) row[T::E] = top[r], row[T::E + 1] = sum;
  }
  __syncthreads();
  for (int place = threadIdx.x; place < 16 * T::E; place += T::THREADS) {
    const int row = place / T::E, e = place % T::E;
    if (q0 + row >= rows) break;
    float high = -INFINITY, sum = 0.0f, all_sums = 0.0f;
#pragma unroll
    for (int i = 0; i < T::KW; ++i) high = tc::max(high, shared[(i * 16 + row) * T::LDO + T::E]);
    const float base = high == -INFINITY ? 0.0f : high;
#pragma unroll
    for (int i = 0; i < T::KW; ++i) {
      const float* from = shared + (i * 16 + row) * T::LDO;
      const float weight = expf(from[T::E] - base);
      all_sums += weight * from[T::E + 1];
      sum += weight * from[e];
    }
    const size_t at = (size_t)(q0 + row) * stride;
    out.one(at + e, PARTED ? sum : sum * normalizer<SAFE>(all_sums));
    if (PARTED && e == 0) {
      out.one(at + T::E, high);
      out.one(at + T::E + 1, all_sums);
    }
  }
}

}  // namespace tc
