// Products in equal shares (stream.cuh) by TMA and wgmma (hopper.cuh): the ring goes on from tile to tile, so that the copies of the next one arrive while sums are stored.
#pragma once
#include "hopper.cuh"
#include "stream.cuh"

namespace tc {

// As gemm_stream; a(row) and b(column): sources that begin there.
template <class P, class T, int M, int N, int STEPS, int BLOCKS, class MakeA, class MakeB, class Out, class Value>
TC_DEVICE void gemm_hopper_stream(const MakeA& a, const MakeB& b, const Out& out, typename P::Sum* parts, const Value& value) {
  using S = Shares<T, M, N, STEPS, BLOCKS>;
  const auto copy = [&](auto& ring) {
    S::walk([&](int m0, int n0, int from, int steps) { hopper_copies<T>(ring, a(m0), b(n0), from, steps); });
  };
  in_warp_groups<T>(copy, [&](auto& ring, int group, int lane) {
    const int own = group * T::MT * 64;  // its first row
    S::walk([&](int m0, int n0, int from, int steps) {
      typename P::Sum c[T::MT][T::BN / 2] = {};
      const int last = hopper_sums<P, T>(ring, own, steps, c);
      if (!P::blocked) ring.release(last);
      if (steps == STEPS)
        hopper_store<T, N>(c, own, lane, out, M, m0, n0, value);
      else
        hopper_store<T, T::BN>(c, own, lane, S::part(parts, from), T::BM, 0, 0, [](int, int, typename P::Sum sum) { return sum; });
    });
  });
}

}  // namespace tc
