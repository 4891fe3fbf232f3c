// Recurrent layers: the product of a state in shared memory with its weights.
#pragma once
#include "tcompile.cuh"

namespace tc {

// sums[part][gate][unit] = sum over a part's k of state[k] * weights[k][gate][unit], for COUNT gates from FIRST on, of G. A block of UNITS x PARTS threads: neighbours read neighbouring
// units' weights. Barriers are the caller's: before, as the state is complete, and after.
template <int H, int G, int FIRST, int COUNT, int UNITS, int PARTS, class V> TC_DEVICE void state_products(V* sums, const V* state, const V* __restrict__ weights) {
  constexpr int LENGTH = (H + PARTS - 1) / PARTS;
  const int part = threadIdx.x / UNITS;
  for (int unit = threadIdx.x % UNITS; unit < H; unit += UNITS) {
    V sum[COUNT] = {};
#pragma unroll 4
    for (int k = part * LENGTH; k < min<int>(H, (part + 1) * LENGTH); ++k)
#pragma unroll
      for (int gate = 0; gate < COUNT; ++gate) sum[gate] += state[k] * weights[(k * G + FIRST + gate) * H + unit];
#pragma unroll
    for (int gate = 0; gate < COUNT; ++gate) sums[(part * G + FIRST + gate) * H + unit] = sum[gate];
  }
}

// Their sum over the parts.
template <int H, int G, int PARTS, class V> TC_DEVICE V state_product(const V* sums, int gate, int unit) {
  V sum = 0;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) sum += sums[(part * G + gate) * H + unit];
  return sum;
}

// How many steps a row of a batch has; one out of range is recorded.
TC_DEVICE int steps_of(long long length, int most, int* error, int site) {
  if (length >= 0 && length <= most) return (int)length;
  report(error, site);
  return 0;
}

}  // namespace tc
