// Softmax attention in one pass over keys and values; the scores stay in registers.
// Online softmax: Milakov and Gimelshein (2018); blocks of queries over blocks of keys: Dao et al., FlashAttention (2022).
#pragma once
#include "tcompile.cuh"

namespace tc {

template <int ROWS, int COLS, int STRIDE> struct Rows {  // row-major with a stride
  const float* data;
  TC_DEVICE const float* at(int r, int c) const { return r < ROWS && c < COLS ? data + (size_t)r * STRIDE + c : nullptr; }
};

template <int D, int E, int BT_> struct Heads {
  static constexpr int BQ = 64, BT = BT_, THREADS = 128;
  static constexpr int DP = (D + 15) / 16 * 16, EP = (E + 15) / 16 * 16, LDQ = DP + 8, LDV = EP + 4;
  static constexpr int Q_FLOATS = BQ * LDQ, K_FLOATS = BT * LDQ, STAGE_FLOATS = K_FLOATS + BT * LDV;
};

// Queries q0 .. q0 + 63 of one head. score(s, t, x): the masked, scaled score of query s and key t whose product is x; store(s, e, value) is called for s < QUERIES,
// e < E. CAUSAL: keys behind a query are hidden by -inf, so their blocks are left out. SAFE: a query that sees nothing gives 0 instead of NaN.
template <class P, class T, int QUERIES, int KEYS, int E, bool CAUSAL, bool SAFE, int VD, int VE, class Q, class K, class V, class Score, class Store>
TC_DEVICE void attention(const Q& q, const K& k, const V& v, int q0, const Score& score, const Store& store) {
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* const stages = shared + T::Q_FLOATS;
  const int keys = CAUSAL ? tc::min(KEYS, q0 + T::BQ) : KEYS, steps = (keys + T::BT - 1) / T::BT;
  auto fill = [&](int step) {
    float* slot = stages + step % 2 * T::STAGE_FLOATS;
    stage<T::BT, T::DP, T::LDQ, T::THREADS, VD>(slot, k, step * T::BT, 0);
    stage<T::BT, T::EP, T::LDV, T::THREADS, VE>(slot + T::K_FLOATS, v, step * T::BT, 0);
  };
  stage<T::BQ, T::DP, T::LDQ, T::THREADS, VD>(shared, q, q0, 0);
  fill(0);
  commit_copies();
  float out[T::EP / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<0>();
    __syncthreads();
    if (step + 1 < steps) fill(step + 1);
    commit_copies();
    const float* ks = stages + step % 2 * T::STAGE_FLOATS;
    const float* vs = ks + T::K_FLOATS;
    float s[T::BT / 8][4] = {};
#pragma unroll
    for (int d = 0; d < T::DP; d += 16) {
      const float* p = shared + (warp * 16 + g) * T::LDQ + d + 2 * t;
      const typename P::A fq = P::a(pair(p), pair(p + 8 * T::LDQ), pair(p + 8), pair(p + 8 * T::LDQ + 8));
#pragma unroll
      for (int j = 0; j < T::BT / 8; ++j) {
        const float* p = ks + (j * 8 + g) * T::LDQ + d + 2 * t;
        P::mma(s[j], fq, P::b(pair(p), pair(p + 8)));
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows g and g + 8 of the warp, spread over its four lanes t
      const int query = q0 + warp * 16 + g + r * 8;
      float high = top[r];
#pragma unroll
      for (int j = 0; j < T::BT / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = step * T::BT + j * 8 + 2 * t + e;
          float& x = s[j][r * 2 + e];
          x = query < QUERIES && key < KEYS ? score(query, key, x) : -INFINITY;
          high = tc::max(high, x);
        }
      high = tc::max(high, shuffle_xor(high, 1));
      high = tc::max(high, shuffle_xor(high, 2));
      const float base = high == -INFINITY ? 0.0f : high, old = expf(top[r] - base);
      top[r] = high;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < T::BT / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[j][r * 2 + e];
          x = expf(x - base);
          sum += x;
        }
      total[r] = total[r] * old + sum;
#pragma unroll
      for (int j = 0; j < T::EP / 8; ++j) {
        out[j][r * 2] *= old;
        out[j][r * 2 + 1] *= old;
      }
    }
#pragma unroll
    for (int i = 0; i < T::BT / 16; ++i) {  // the scores' registers are those of an A operand: columns of C are k of the next product
      const float(&a)[4] = s[2 * i], (&b)[4] = s[2 * i + 1];
      const typename P::A fp = P::a({a[0], a[1]}, {a[2], a[3]}, {b[0], b[1]}, {b[2], b[3]});
#pragma unroll
      for (int j = 0; j < T::EP / 8; ++j) {
        const float* p = vs + (i * 16 + 2 * t) * T::LDV + j * 8 + g;
        P::mma(out[j], fp, P::b({p[0], p[T::LDV]}, {p[8 * T::LDV], p[9 * T::LDV]}));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const float scale = SAFE && sum == 0.0f ? 0.0f : 1.0f / sum;
    const int query = q0 + warp * 16 + g + r * 8;
#pragma unroll
    for (int j = 0; j < T::EP / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = j * 8 + 2 * t + e;
        if (query < QUERIES && column < E) store(query, column, sum == 0.0f && !SAFE ? NAN : out[j][r * 2 + e] * scale);
      }
  }
}

}  // namespace tc
