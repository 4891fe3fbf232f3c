// Products of int8 by constant weights of 1 to 8 bits, in integers: the kernels of weight_only.cuh whose tensor core multiplies bytes (mma.sync m16n8k32 of s8), 32 k of two tiles at once.
//
// Lane and columns and k are as there, but words have another order: register q = 4 i + 2 s + r of a unit holds column 4 g + 2 i + r at the four k from 16 s + 4 t, in its bytes. Planes of 4, 2
// and 1 bits have 2, 4 or 8 registers a word, at the same place of each byte. A code goes to the upper end of its byte, in two's complement of code - half, by a shift and a mask (LOP3) of every
// plane: nothing is subtracted and no sign extended. So sums are 2^(8 - BITS) times too large, which the scales in memory make up for. Zeros meet the sum of X, which is one more product, by ones.
#pragma once
#include "weight_only.cuh"

namespace tc {

// X as words of four int8.
struct Integers {
  static constexpr int RUN = 1, UNIT = 8, PAD = 4;  // as of Activations
};

template <int BITS, bool SIGNS> TC_DEVICE uint32_t upper_bytes(const UnitCodes<BITS>& unit, int q) {
  constexpr int LOW = 8 - BITS;
  if constexpr (BITS == 8) return unit.w[q];
  uint32_t found = SIGNS ? 0x40404040u : 0u;  // half of a sign: 64 or -64
  if constexpr ((BITS & 4) != 0) found = shifted_right(unit.w[q / 2], 4 * (q % 2) - LOW) & 0x0f0f0f0fu << LOW | found;
  if constexpr ((BITS & 2) != 0) found = shifted_right(unit.w[(BITS & 4) + q / 4], 2 * (q % 4) - LOW - (BITS & 4)) & 0x03030303u << (LOW + (BITS & 4)) | found;
  if constexpr ((BITS & 1) != 0) found = shifted_right(unit.w[BITS & 6], q - 7) & 0x80808080u | found;
  return found;
}

template <class W> struct Fragments<Integers, W> {
  static constexpr int BITS = W::BITS;
  uint32_t a[2][4];  // tile, 2 s + r
  int zeros[W::SUMS][4];
  TC_DEVICE void unpack(const UnitCodes<BITS>& codes, const uint32_t (&zero_bytes)[W::SUMS]) {
#pragma unroll
    for (int q = 0; q < 8; ++q) a[q / 4][q % 4] = upper_bytes<BITS, BITS == 1 && !W::ZEROS>(codes, q);
#pragma unroll
    for (int i = 0; i < W::SUMS; ++i)
#pragma unroll
      for (int column = 0; column < 4; ++column)
        if (W::ZEROS) zeros[i][column] = ((int)(zero_bytes[i] >> 8 * column & 0xff) - (1 << (BITS - 1))) * (1 << (8 - BITS));
  }
  // c += the unit times 8 rows of X. Sums are below 2^22, so on top of the bits of 1.5 * 2^23 they are floats without a conversion.
  template <class Run> TC_DEVICE void multiply(float (&c)[2][4], const Float4 (&scales)[W::SUMS], const Run& run) const {
    constexpr int BASE = 0x4b400000;
    uint32_t b[2];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float word[1];
      run(word, step);
      b[step] = as_bits(word[0]);
    }
#pragma unroll
    for (int i = 0; i < W::SUMS; ++i) {
      const uint32_t b0 = W::SUMS == 2 && i == 1 ? 0u : b[0], b1 = W::SUMS == 2 && i == 0 ? 0u : b[1];
      int xs[4] = {};
      if (W::ZEROS) mma_s8s8(xs, 0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u, b0, b1);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        int sum[4] = {BASE, BASE, BASE, BASE};
        mma_s8s8(sum, a[tile][0], a[tile][1], a[tile][2], a[tile][3], b0, b1);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (W::ZEROS) sum[e] -= zeros[i][2 * tile + e / 2] * xs[e % 2];
          c[tile][e] = fmaf(scales[i].v[2 * tile + e / 2], as_float((uint32_t)sum[e]) - 12582912.0f, c[tile][e]);
        }
      }
    }
  }
};

}  // namespace tc
