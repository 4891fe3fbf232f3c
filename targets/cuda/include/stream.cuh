// Products whose blocks take equal shares of all steps of all tiles (stream-K: Osama et al. 2023, "Stream-K: work-centric parallel decomposition for dense
// matrix-matrix multiplication on the GPU"), so that no wave is partly empty. Steps of a tile follow each other, and tiles do, row by row; a block goes on where the one before it ends.
#pragma once
#include "tcompile.cuh"

namespace tc {

// A product of M x N in tiles of STEPS_ steps, in BLOCKS shares.
template <class T, int M, int N, int STEPS_, int BLOCKS> struct Shares {
  static constexpr int STEPS = STEPS_, WIDE = (N + T::BN - 1) / T::BN, HIGH = (M + T::BM - 1) / T::BM, ALL = STEPS * WIDE * HIGH;
  static constexpr int PLACES = T::BM * T::BN;
  static_assert(BLOCKS <= ALL, "no share is empty");
  // The first step of a block; the one behind the last block's is ALL.
  static TC_DEVICE int first(int block) { return ALL / BLOCKS * block + min(ALL % BLOCKS, block); }
  // each(m0, n0, from, steps) for the tiles of this block's share, and which steps of them it has.
  template <class Each> static TC_DEVICE void walk(const Each& each) {
    const int end = first(blockIdx.x + 1);
    int at = first(blockIdx.x);
#pragma unroll 1
    while (at < end) {
      const int tile = at / STEPS, from = at % STEPS, steps = min(STEPS - from, end - at);
      each(tile / WIDE * T::BM, tile % WIDE * T::BN, from, steps);
      at += steps;
    }
  }
  // Where the sums of a tile that is not all in this share go.
  template <class Sum> static TC_DEVICE To<Sum> part(Sum* parts, int from) { return {parts + (size_t)(2 * blockIdx.x + (from == 0)) * PLACES}; }
};

// A tile that is all in one share is finished at once: out = value(row, column, sum). Of others the sums so far go to `parts`, [BLOCKS][2][BM * BN]: of a block's first tile, which another one
// began, and of its last, which it began.
template <class P, class T, int M, int N, int STEPS, int BLOCKS, int VA, int VB, class SourceA, class SourceB, class Out, class Value>
TC_DEVICE void gemm_stream(const SourceA& a, const SourceB& b, const Out& out, typename P::Sum* parts, const Value& value) {
  using S = Shares<T, M, N, STEPS, BLOCKS>;
  const Place<T> place;
  S::walk([&](int m0, int n0, int from, int steps) {
    typename P::Sum c[T::MT][T::NT][4] = {};
    auto bring = [&](float* as, float* bs, int step) {
      stage<T::BM, T::BK, T::LDA, T::THREADS, VA>(as, a, m0, (from + step) * T::BK);
      stage<T::BK, T::BN, T::LDB, T::THREADS, VB>(bs, b, (from + step) * T::BK, n0);
    };
    gemm_sums<P, T>(place, steps, bring, c);
    if (steps == STEPS)
      gemm_store<P, T>(place, c, out, M, N, N, m0, n0, value);
    else
      gemm_store<P, T>(place, c, S::part(parts, from), T::BM, T::BN, T::BN, 0, 0, [](int, int, typename P::Sum sum) { return sum; });
    __syncthreads();  // the last step of this tile is still read by some warps
  });
}

// Ends tiles of several shares: done(row, column, sum) for the element `place` of the tile that block `next` goes on with, whose parts are added up in their order. Nothing where a
// tile ends between the shares, or where an earlier block has gone on with it, too.
template <class T, int M, int N, int STEPS, int BLOCKS, class Sum, class Done> TC_DEVICE void join_shares(const Sum* parts, int next, int place, const Done& done) {
  using S = Shares<T, M, N, STEPS, BLOCKS>;
  const int tile = S::first(next) / S::STEPS, begins = tile * S::STEPS, ends = begins + S::STEPS;
  if (S::first(next) == begins || S::first(next - 1) > begins) return;
  const int m = tile / S::WIDE * T::BM + place / T::BN, n = tile % S::WIDE * T::BN + place % T::BN;
  if (m >= M || n >= N) return;
  Sum sum = parts[(size_t)(2 * next - 1) * S::PLACES + place];
  for (int block = next; S::first(block) < ends; ++block) sum += parts[(size_t)(2 * block) * S::PLACES + place];
  done(m, n, sum);
}

}  // namespace tc
