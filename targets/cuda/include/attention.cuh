// Softmax attention in one pass over keys and values; the scores stay in registers.
// Online softmax: Milakov and Gimelshein (2018); blocks of queries over blocks of keys: Dao et al., FlashAttention (2022).
#pragma once
#include "tcompile.cuh"

namespace tc {

template <int ROWS, int COLS, int STRIDE> struct Rows {  // row-major with a stride
  const float* data;
  TC_DEVICE const float* at(int r, int c) const { return r < ROWS && c < COLS ? data + (size_t)r * STRIDE + c : nullptr; }
};

struct OpenRows {  // of sizes that are known while running
  const float* data;
  int rows, columns, stride;
  TC_DEVICE const float* at(int r, int c) const { return r < rows && c < columns ? data + (size_t)r * stride + c : nullptr; }
};

// Probabilities times values: the policy of that product, how many values lie in a word of memory, and fragments of 16 keys x 16 columns of rows of STRIDE floats.
template <class P> struct Values {
  using Policy = P;
  static constexpr int PER_WORD = 1;
  template <int STRIDE> static TC_DEVICE void load(typename P::B (&f)[2], const float* rows, int column) {
    const float* p = rows + 2 * (threadIdx.x % 4) * STRIDE + column + threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j, p += 8) f[j] = P::b({p[0], p[STRIDE]}, {p[8 * STRIDE], p[9 * STRIDE]});
  }
};
template <bool BF16> struct Values<Words<MmaHalf<BF16>>> {  // keys are k here, so what lies in a word has to be parted
  using Policy = Half<BF16>;
  static constexpr int PER_WORD = 2;
  template <int STRIDE> static TC_DEVICE void load(typename Policy::B (&f)[2], const float* rows, int column) {
    uint32_t r[4];
    load_transposed(r, rows + threadIdx.x % 16 * STRIDE + column / 2 + threadIdx.x % 32 / 16 * 4);
    f[0] = {{r[0], r[1]}};
    f[1] = {{r[2], r[3]}};
  }
};

// Of a row that is spread over four lanes.
TC_DEVICE float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
template <class F> TC_DEVICE float row_max(float x, const F& max) {
  x = max(x, shuffle_xor(x, 1));
  return max(x, shuffle_xor(x, 2));
}
// What the sums of a row are multiplied by, whose probabilities have this sum: zeros stay zeros where SAFE says so, and are NaN otherwise.
template <bool SAFE> TC_DEVICE float normalizer(float total) { return SAFE && total == 0.0f ? 0.0f : 1.0f / total; }

// D, E: elements of a key and of a value; DP, EP: words of theirs that are computed with.
template <class P, int D, int E, int BT_> struct Heads {
  static constexpr int BQ = 64, BT = BT_, THREADS = 128, PER_WORD = Values<P>::PER_WORD;
  static constexpr int DP = (D / PER_WORD + 15) / 16 * 16, E16 = (E + 15) / 16 * 16, EP = E16 / PER_WORD, LDQ = DP + 8, LDV = EP + 4;
  static constexpr int Q_FLOATS = BQ * LDQ, K_FLOATS = BT * LDQ, STAGE_FLOATS = K_FLOATS + BT * LDV;
};

// Which blocks of keys a block of queries takes: at(begin) .. at(end - 1). tile: negative where nothing in a block is hidden by what decides that; where it may be, what `score` is told.
struct EveryStep {  // in a row, and every score is looked at
  static constexpr bool EVERY = true;
  int begin, end;
  TC_DEVICE int at(int i) const { return i; }
  TC_DEVICE int tile(int) const { return 0; }
  template <class Score> static TC_DEVICE float score(const Score& score, int s, int t, float x, int) { return score(s, t, x); }
};

struct ToldTile {
  static constexpr bool EVERY = false;
  template <class Score> static TC_DEVICE float score(const Score& score, int s, int t, float x, int tile) { return score(s, t, x, tile); }
};

// Blocks of BT keys that some of BQ queries from q0 on see, which look at the keys from BEFORE before theirs to AFTER behind; negative: as far as there are any. One block at least.
template <int BQ, int BT, int BEFORE, int AFTER> struct Window : ToldTile {
  int begin, end, q0, keys;
  TC_DEVICE Window(int keys, int q0) : q0(q0), keys(keys) {
    end = ((AFTER < 0 ? keys : tc::min(keys, q0 + BQ + AFTER)) + BT - 1) / BT;
    begin = BEFORE < 0 ? 0 : tc::min(tc::max(q0 - BEFORE, 0) / BT, end - 1);
  }
  TC_DEVICE int at(int i) const { return i; }
  TC_DEVICE int tile(int i) const {
    const int first = i * BT, last = first + BT - 1;
    return last < keys && (AFTER < 0 || last <= q0 + AFTER) && (BEFORE < 0 || first >= q0 + BQ - 1 - BEFORE) ? -1 : 0;
  }
  static TC_DEVICE bool sees(int s, int t) { return (AFTER < 0 || t <= s + AFTER) && (BEFORE < 0 || t >= s - BEFORE); }
};

// The blocks of a list, each with its tile of the mask: [BQ][BT] floats, which are added to scores, or -inf. lists (targets/cuda/attention_lists.py packs them): where list n begins and its
// length, for all n; entries of lists, a block and where its tile begins, -1 without one; the tiles.
struct BlockList : ToldTile {
  const int* entries;
  int begin = 0, end;
  TC_DEVICE BlockList(const int* lists, int number) : entries(lists + lists[2 * number]), end(lists[2 * number + 1]) {}
  TC_DEVICE int at(int i) const { return entries[2 * i]; }
  TC_DEVICE int tile(int i) const { return entries[2 * i + 1]; }
};

// Queries q0 .. q0 + 63 of one head to the rows of `out`, `stride` elements apart. score(s, t, x): the masked, scaled score of query s and key t whose product is x.
// SAFE: a query that sees nothing gives 0 instead of NaN. PARTS: rows are E sums, the largest score and the sum of probabilities, for `joined`.
template <class P, class T, int E, bool SAFE, bool PARTS, int VD, int VE, class Q, class K, class V, class Out, class Steps, class Score>
TC_DEVICE void attention_steps(const Q& q, const K& k, const V& v, const Out& out, int queries, int all_keys, int stride, const Steps& steps, int q0, const Score& score) {
  using W = typename Values<P>::Policy;
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float* const stages = shared + T::Q_FLOATS;
  auto fill = [&](int i) {
    float* slot = stages + i % 2 * T::STAGE_FLOATS;
    const int step = steps.at(i);
    stage<T::BT, T::DP, T::LDQ, T::THREADS, VD>(slot, k, step * T::BT, 0);
    stage<T::BT, T::EP, T::LDV, T::THREADS, VE>(slot + T::K_FLOATS, v, step * T::BT, 0);
  };
  stage<T::BQ, T::DP, T::LDQ, T::THREADS, VD>(shared, q, q0, 0);
  fill(steps.begin);
  commit_copies();
  float sums[T::E16 / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int i = steps.begin; i < steps.end; ++i) {
    wait_copies<0>();
    __syncthreads();
    if (i + 1 < steps.end) fill(i + 1);
    commit_copies();
    const int step = steps.at(i), tile = steps.tile(i);
    const float* ks = stages + i % 2 * T::STAGE_FLOATS;
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
      const auto masked = [&](int tile) {
#pragma unroll
        for (int j = 0; j < T::BT / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = step * T::BT + j * 8 + 2 * t + e;
            float& x = s[j][r * 2 + e];
            x = query < queries && key < all_keys ? steps.score(score, query, key, x, tile) : -INFINITY;
            high = tc::max(high, x);
          }
      };
      if constexpr (Steps::EVERY) masked(0);
      else if (tile < 0) masked(-1);
      else masked(tile);
      high = row_max(high, tc::max<float>);
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
      for (int j = 0; j < T::E16 / 8; ++j) {
        sums[j][r * 2] *= old;
        sums[j][r * 2 + 1] *= old;
      }
    }
#pragma unroll
    for (int i = 0; i < T::BT / 16; ++i) {  // the scores' registers are those of an A operand: columns of C are k of the next product
      const float(&a)[4] = s[2 * i], (&b)[4] = s[2 * i + 1];
      const typename W::A fp = W::a({a[0], a[1]}, {a[2], a[3]}, {b[0], b[1]}, {b[2], b[3]});
#pragma unroll
      for (int j = 0; j < T::E16 / 8; j += 2) {
        typename W::B fv[2];
        Values<P>::template load<T::LDV>(fv, vs + i * 16 * T::LDV, j * 8);
        W::mma(sums[j], fp, fv[0]);
        W::mma(sums[j + 1], fp, fv[1]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(total[r]), scale = PARTS ? 1.0f : normalizer<SAFE>(sum);
    const int query = q0 + warp * 16 + g + r * 8;
    if (query >= queries) continue;
    const size_t row = (size_t)query * stride;
#pragma unroll
    for (int j = 0; j < T::E16 / 8; ++j)
      put<E>(out, row, j * 8 + 2 * t, [&](int e) { return sums[j][r * 2 + e] * scale; });
    if (PARTS && t == 0) {
      out.one(row + E, top[r]);
      out.one(row + E + 1, sum);
    }
  }
}

// The same over all keys, or `part` blocks of them from `first` on. CAUSAL: keys behind a query are hidden by -inf, so their blocks are left out.
template <class P, class T, int E, bool CAUSAL, bool SAFE, bool PARTS, int VD, int VE, class Q, class K, class V, class Out, class Score>
TC_DEVICE void attention(const Q& q, const K& k, const V& v, const Out& out, int queries, int all_keys, int stride, int part, int q0, int first, const Score& score) {
  const int keys = CAUSAL ? tc::min(all_keys, q0 + T::BQ) : all_keys, all = (keys + T::BT - 1) / T::BT;
  const EveryStep steps{first, PARTS ? tc::min(all, first + part) : all};
  attention_steps<P, T, E, SAFE, PARTS, VD, VE>(q, k, v, out, queries, all_keys, stride, steps, q0, score);
}

// The same for sizes that are known; PART: 0 for all blocks of keys.
template <class P, class T, int QUERIES, int KEYS, int E, int STRIDE, bool CAUSAL, bool SAFE, int PART, int VD, int VE, class Q, class K, class V, class Out, class Score>
TC_DEVICE void attention(const Q& q, const K& k, const V& v, const Out& out, int q0, int first, const Score& score) {
  attention<P, T, E, CAUSAL, SAFE, PART != 0, VD, VE>(q, k, v, out, QUERIES, KEYS, STRIDE, PART, q0, first, score);
}

// Element e of a row from its `count` parts, in their order; `rows` rows of E + 2 lie between parts.
template <int E, bool SAFE> TC_DEVICE float joined(const float* parts, int count, size_t rows, int e) {
  const size_t stride = rows * (E + 2);
  float top = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
  for (int i = 0; i < count; ++i) top = tc::max(top, parts[i * stride + E]);
  const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float weight = expf(parts[i * stride + E] - base);
    total += weight * parts[i * stride + E + 1];
    sum += weight * parts[i * stride + e];
  }
  return total == 0.0f ? (SAFE ? 0.0f : NAN) : sum / total;
}
// The logarithm of the sum of a row's exponentials, from its parts.
template <int E> TC_DEVICE float joined_logsum(const float* parts, int count, size_t rows) {
  const size_t stride = rows * (E + 2);
  float top = -INFINITY, total = 0.0f;
  for (int i = 0; i < count; ++i) top = tc::max(top, parts[i * stride + E]);
  const float base = top == -INFINITY ? 0.0f : top;
  for (int i = 0; i < count; ++i) total += expf(parts[i * stride + E] - base) * parts[i * stride + E + 1];
  return base + logf(total);
}
template <int PARTS, int E, bool SAFE> TC_DEVICE float joined(const float* parts, size_t rows, int e) { return joined<E, SAFE>(parts, PARTS, rows, e); }

}  // namespace tc
