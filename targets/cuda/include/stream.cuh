// Products whose blocks take equal shares of all steps of all tiles (stream-K: Osama et al. 2023, "Stream-K: work-centric parallel decomposition for dense
// matrix-matrix multiplication on the GPU"), so that no wave is partly empty. Steps of a tile follow each other, and tiles do, row by row; a block goes on where the one before it ends.
#pragma once
#include "tcompile.cuh"

namespace tc {

// The product M x K by K x N in BLOCKS shares.
template <class T, int M, int N, int K, int BLOCKS> struct Shares {
  static constexpr int STEPS = (K + T::BK - 1) / T::BK, WIDE = (N + T::BN - 1) / T::BN, HIGH = (M + T::BM - 1) / T::BM, ALL = STEPS * WIDE * HIGH;
  static constexpr int PLACES = T::BM * T::BN;
  static_assert(BLOCKS <= ALL, "no share is empty");
  // The first step of a block; the one behind the last block's is ALL.
  static TC_DEVICE int first(int block) { return ALL / BLOCKS * block + min(ALL % BLOCKS, block); }
};

// A tile that is all in one share is finished at once: out = value(row, column, sum). Of others the sums so far go to `parts`, [BLOCKS][2][BM * BN]: of a block's first tile, which another one
// began, and of its last, which it began.
template <class P, class T, int M, int N, int K, int BLOCKS, int VA, int VB, class SourceA, class SourceB, class Out, class Value>
TC_DEVICE void gemm_stream(const SourceA& a, const SourceB& b, const Out& out, typename P::Sum* parts, const Value& value) {
  using S = Shares<T, M, N, K, BLOCKS>;
  const Place<T> place;
  const int block = blockIdx.x, end = S::first(block + 1);
  int at = S::first(block);
#pragma unroll 1
  while (at < end) {
    const int tile = at / S::STEPS, from = at % S::STEPS, steps = min(S::STEPS - from, end - at);
    const int m0 = tile / S::WIDE * T::BM, n0 = tile % S::WIDE * T::BN;
    typename P::Sum c[T::MT][T::NT][4] = {};
    auto bring = [&](float* as, float* bs, int step) {
      stage<T::BM, T::BK, T::LDA, T::THREADS, VA>(as, a, m0, (from + step) * T::BK);
      stage<T::BK, T::BN, T::LDB, T::THREADS, VB>(bs, b, (from + step) * T::BK, n0);
    };
    gemm_sums<P, T>(place, steps, bring, c);
    if (steps == S::STEPS) {
      gemm_store<P, T>(place, c, out, M, N, N, m0, n0, value);
    } else {
      const To<typename P::Sum> part{parts + (size_t)(2 * block + (from == 0)) * S::PLACES};
      gemm_store<P, T>(place, c, part, T::BM, T::BN, T::BN, 0, 0, [](int, int, typename P::Sum sum) { return sum; });
    }
    at += steps;
    __syncthreads();  // the last step of this tile is still read by some warps
  }
}

// Ends tiles of several shares: done(row, column, sum) for the element `place` of the tile that block `next` goes on with, whose parts are added up in their order. Nothing where a
// tile ends between the shares, or where an earlier block has gone on with it, too.
template <class T, int M, int N, int K, int BLOCKS, class Sum, class Done> TC_DEVICE void join_shares(const Sum* parts, int next, int place, const Done& done) {
  using S = Shares<T, M, N, K, BLOCKS>;
  const int tile = S::first(next) / S::STEPS, begins = tile * S::STEPS, ends = begins + S::STEPS;
  if (S::first(next) == begins || S::first(next - 1) > begins) return;
  const int m = tile / S::WIDE * T::BM + place / T::BN, n = tile % S::WIDE * T::BN + place % T::BN;
  if (m >= M || n >= N) return;
  Sum sum = parts[(size_t)(2 * next - 1) * S::PLACES + place];
  for (int block = next; S::first(block) < ends; ++block) sum += parts[(size_t)(2 * block) * S::PLACES + place];
  done(m, n, sum);
}

}  // namespace tc
