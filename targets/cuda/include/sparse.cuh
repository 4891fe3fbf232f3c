// Products by constant 16-bit weights of which two in four consecutive k are zero: C [M][N] = X [M][K] W [K][N] on the sparse tensor cores (mma.sp), at twice the rate and 9/16 of the bytes.
//
// As in weight_only.cuh the tensor core multiplies C^T = W^T X^T, and weights lie in memory as the fragments want them (targets/cuda/sparse.py packs them). A unit is 32 columns x 32 k:
// lane l with g = l / 4, t = l % 4 owns columns 4 g .. 4 g + 3. Register 2 h + r of tile i holds, of column 4 g + 2 i + r, the two weights that stay of k = 16 h + 4 t and the next three.
// A word of metadata says which: lanes t = 2 i, 2 i + 1 have those of tile i, of the first and the second 16 k; columns 4 g + 2 i in the low half and the next in the high one, two
// positions of 2 bits per four k.
#pragma once
#include "weight_only.cuh"

namespace tc {

template <bool BF16_, int K_, int N_> struct Sparse {
  static constexpr bool BF16 = BF16_;
  static constexpr int N = N_, UNITS = (K_ + 31) / 32, UNIT_FLOATS = 2 * 128 + 32;
  const int* data;
  TC_DEVICE const float* at(int strip, int unit) const { return words(data) + ((size_t)strip * UNITS + unit) * UNIT_FLOATS; }
};

// A block makes BM x 32 WARPS of C, a strip per warp; STAGES steps of 64 k are in flight. A warp copies its own weights. The padding of the rows of X puts the lanes of every load into
// different banks.
template <int BM_, int WARPS_, int STAGES_> struct SparseTile {
  static constexpr int BM = BM_, WARPS = WARPS_, STAGES = STAGES_, BK = 32, UNITS = 2, THREADS = 32 * WARPS, LDA = BK + 4;
  static constexpr int X_FLOATS = BM * LDA, WARP_FLOATS = UNITS * (2 * 128 + 32), STAGE_FLOATS = X_FLOATS + WARPS * WARP_FLOATS;
};

// out [m0 ..][strip ..] = value(row, column, sum) over the units first .. last, from a step's beginning to its end or the last unit. VEC: words per copy of X.
template <class T, int VEC, class W, class X, class Out, class Value>
TC_DEVICE void gemm_sparse(const X& x, const W& w, const Out& out, int rows, int m0, int strip0, int first, int last, const Value& value) {
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int strip = strip0 + warp, steps = (last - first + T::UNITS - 1) / T::UNITS;
  const bool live = strip * 32 < W::N;
  float c[T::BM / 8][2][4] = {};
  auto fill = [&](int step) {
    float* slot = shared + step % T::STAGES * T::STAGE_FLOATS;
    stage<T::BM, T::BK, T::LDA, T::THREADS, VEC>(slot, x, m0, first * 16 + step * T::BK);
    float* own = slot + T::X_FLOATS + warp * T::WARP_FLOATS;
#pragma unroll
    for (int u = 0; u < T::UNITS; ++u) {
      const int unit = first + step * T::UNITS + u;
      const bool there = live && unit < last;
#pragma unroll
      for (int place = lane * 4; place < W::UNIT_FLOATS; place += 128)
        copy_async<16>(own + u * W::UNIT_FLOATS + place, there ? w.at(strip, unit) + place : nullptr, words(w.data));
    }
  };
  in_stages<T::STAGES>(steps, fill, [&](int step) {
    const float* xs = shared + step % T::STAGES * T::STAGE_FLOATS;
    const float* own = xs + T::X_FLOATS + warp * T::WARP_FLOATS;
#pragma unroll
    for (int u = 0; u < T::UNITS; ++u) {
      Word4 a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) a[i] = *reinterpret_cast<const Word4*>(own + u * W::UNIT_FLOATS + i * 128 + lane * 4);
      const bool there = live && first + step * T::UNITS + u < last;
      // zeros are no metadata: the positions of two weights differ
      const uint32_t positions = there ? as_bits(own[u * W::UNIT_FLOATS + 256 + lane]) : 0x44444444u;
#pragma unroll
      for (int i = 0; i < T::BM / 8; ++i) {
        uint32_t b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) b[j] = as_bits(xs[(i * 8 + g) * T::LDA + u * 16 + t + 4 * j]);
        mma_sparse<W::BF16, 0>(c[i][0], a[0].w, b, positions);
        mma_sparse<W::BF16, 1>(c[i][1], a[1].w, b, positions);
      }
    }
  });
  put_strip<W::N>(out, rows, m0, strip, c, value);
}
// The same for M rows.
template <class T, int M, int VEC, class W, class X, class Out, class Value>
TC_DEVICE void gemm_sparse(const X& x, const W& w, const Out& out, int m0, int strip0, int first, int last, const Value& value) {
  gemm_sparse<T, VEC>(x, w, out, M, m0, strip0, first, last, value);
}

}  // namespace tc
