// Products by constant weights of 1 to 8 bits: C [M][N] = X [M][K] ((codes - zeros) * scales) [K][N], a scale and perhaps a zero per group of k and column.
//
// The tensor core multiplies C^T = W^T X^T: 16 columns of W are the rows of its first operand, 8 rows of X the columns of its second, so that one row of X is a product like
// another. Differences of codes and zeros are integers that bf16 and fp16 hold exactly; scales come in behind the sums over 32 or 16 k, in fp32, and no weight is ever rounded.
//
// Codes lie in memory as the fragments want them (targets/cuda/weight_only.py packs them). A unit is 32 columns x 32 k: lane l with g = l / 4, t = l % 4 owns columns 4 g .. 4 g + 3
// and, of step s = 0, 1, k = 16 s + 4 t .. + 3. Register 2 h + r of tile i holds column 4 g + 2 i + r at k = 16 s + 4 t + 2 h and the next.
// So a lane owns 32 codes: BITS words. Of fewer than 8 bits they are planes of 4, 2 and 1 bits, as the binary digits of BITS say, the widest one with the lowest bits of the codes; every
// plane is one load of a lane's own 4, 2 or 1 words, and a register a shift and a mask with an or (LOP3) from each.
#pragma once
#include "tcompile.cuh"

namespace tc {

struct alignas(16) Word4 { uint32_t w[4]; };
struct alignas(8) Word2 { uint32_t w[2]; };
struct alignas(16) Float4 { float v[4]; };

// A lane's codes of a unit.
template <int BITS> struct UnitCodes {
  uint32_t w[BITS];
  TC_DEVICE void load(const float* unit, int lane) {
#pragma unroll
    for (int i = 0; i + 4 <= BITS; i += 4) {
      const Word4 part = *reinterpret_cast<const Word4*>(unit + 32 * i + lane * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[i + j] = part.w[j];
    }
    if constexpr ((BITS & 2) != 0) {
      const Word2 part = *reinterpret_cast<const Word2*>(unit + 32 * (BITS & 4) + lane * 2);
      w[BITS & 4] = part.w[0], w[(BITS & 4) + 1] = part.w[1];
    }
    if constexpr ((BITS & 1) != 0) w[BITS & 6] = as_bits(unit[32 * (BITS & 6) + lane]);
  }
};

TC_DEVICE uint32_t shifted_right(uint32_t word, int places) { return places < 0 ? word << -places : word >> places; }

// Codes to pairs of 16-bit floats without conversions: the low bits of 128 in bf16 and of 1024 in fp16 count units, so (code | bits of 128) - (zero | bits of 128) is exact.
template <int BITS, bool BF16> struct Codes {
  static constexpr uint32_t BASE = BF16 ? 0x43004300u : 0x64006400u;
  static constexpr uint32_t MIDDLE = BASE | (1u << (BITS - 1)) * 0x00010001u;

  // the zero of a column, as often as a word has room, as `pairs` subtracts it
  static TC_DEVICE uint32_t zero(uint32_t byte) {
    const uint32_t twice = byte * 0x00010001u;
    if (BITS == 8 && BF16) return signed_bytes(twice ^ 0x00800080u);
    return twice | BASE;
  }
  // bytes of two's complement, at bits 0 and 16: 128 + low seven bits - (128, or 256 with the sign: the lowest bit of the exponent)
  static TC_DEVICE uint32_t signed_bytes(uint32_t w) { return minus_pairs<true>(masked_or(w, 0x007f007fu, 0x43004300u), masked_or(w, 0x00800080u, 0x43004300u)); }

  // register i of a tile (0, 1) at a step (0, 1): two codes of fewer than 8 bits over BASE
  static TC_DEVICE uint32_t pair(const UnitCodes<BITS>& unit, int tile, int step, int i) {
    const int place = 4 * tile + i;
    uint32_t found = BASE;
    if constexpr ((BITS & 4) != 0) found = masked_or(unit.w[2 * step + tile] >> 4 * i, 0x000f000fu, found);
    if constexpr ((BITS & 2) != 0) found = masked_or(shifted_right(unit.w[(BITS & 4) + step], 2 * place - (BITS & 4)), 0x00030003u << (BITS & 4), found);
    if constexpr ((BITS & 1) != 0) found = masked_or(shifted_right(unit.w[BITS & 6], 8 * step + place - (BITS & 6)), 0x00010001u << (BITS & 6), found);
    return found;
  }
  // two signs of a half: what one bit is without zeros
  static TC_DEVICE uint32_t signs(uint32_t word, int place) { return word << (15 - place) & 0x80008000u ^ (BF16 ? 0xbf00bf00u : 0xb800b800u); }

  // the fragment of a tile at a step. ZEROS: `zeros` holds those of the four columns, otherwise it is half of the range
  template <bool ZEROS> static TC_DEVICE void fragment(uint32_t (&a)[4], const UnitCodes<BITS>& unit, int tile, int step, const uint32_t (&zeros)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (BITS == 1 && !ZEROS) {
        a[i] = signs(unit.w[0], 8 * step + 4 * tile + i);
      } else if constexpr (BITS < 8) {
        a[i] = minus_pairs<BF16>(pair(unit, tile, step, i), ZEROS ? zeros[2 * tile + i % 2] : MIDDLE);
      } else {  // signed codes
        const uint32_t bytes = unit.w[4 * step + 2 * tile + i / 2] >> 8 * (i % 2);
        if (BF16) {
          a[i] = signed_bytes(bytes);
          if (ZEROS) a[i] = minus_pairs<true>(a[i], zeros[2 * tile + i % 2]);
        } else {
          a[i] = minus_pairs<false>(bytes & 0x00ff00ffu ^ (BASE | 0x00800080u), ZEROS ? zeros[2 * tile + i % 2] : BASE | 0x00800080u);
        }
      }
    }
  }
};

// BITS, the rows and columns of W, k per group and, rounded up to 16, in memory. codes: [strips][UNITS][BITS * 32] words; scales, zeros: [strips][GROUPS][32].
template <int BITS_, int K_, int N_, int GROUP_, bool ZEROS_> struct Weights {
  static constexpr int BITS = BITS_, K = K_, N = N_, GROUP = GROUP_, SPREAD = (GROUP + 15) / 16 * 16;
  static constexpr bool ZEROS = ZEROS_;
  static constexpr int GROUPS = (K + GROUP - 1) / GROUP;
  static constexpr int UNITS = ((K - 1) / GROUP * SPREAD + (K - 1) % GROUP) / 32 + 1;
  static constexpr int SUMS = SPREAD % 32 ? 2 : 1;  // per unit: a sum that gets a scale has one group
  const int* codes;
  const float* scales;
  const unsigned char* zeros;

  TC_DEVICE const float* at(int strip, int unit) const { return reinterpret_cast<const float*>(codes) + ((size_t)strip * UNITS + unit) * (BITS * 32); }
  // where scales and zeros of a strip begin for the sum `i` of a unit
  TC_DEVICE size_t group(int strip, int unit, int i) const {
    const int found = (32 * unit + 16 * i) / SPREAD;  // behind K there are zeros of X alone
    return ((size_t)strip * GROUPS + (found < GROUPS ? found : GROUPS - 1)) * 32;
  }
};

// X by words (one float32, two 16-bit numbers), its k at the places of the codes: nothing where a group is filled up. All sizes but M in words.
template <int M, int K, int GROUP, int SPREAD> struct Grouped {
  const float* data;
  TC_DEVICE const float* at(int r, int c) const {
    const int inside = c % SPREAD, k = GROUP == SPREAD ? c : c / SPREAD * GROUP + inside;
    return r < M && inside < GROUP && k < K ? data + (size_t)r * K + k : nullptr;
  }
};

template <int K, int GROUP, int SPREAD> struct OpenGrouped {  // of rows whose number is known while running
  const float* data;
  int rows;
  TC_DEVICE const float* at(int r, int c) const {
    const int inside = c % SPREAD, k = GROUP == SPREAD ? c : c / SPREAD * GROUP + inside;
    return r < rows && inside < GROUP && k < K ? data + (size_t)r * K + k : nullptr;
  }
};

// X as words of 16-bit floats. In PARTS of bf16, all but the last cut off, three are all of fp32 and two more than tf32 (an infinity becomes NaN); one is X rounded.
// HALF: it is of 16 bits in memory.
template <int PARTS_, bool BF16_, bool HALF_> struct Activations {
  static constexpr int PARTS = PARTS_;
  static constexpr bool BF16 = BF16_, HALF = HALF_;
  static constexpr int RUN = HALF ? 2 : 4;       // words of the four k of a lane and step
  static constexpr int UNIT = HALF ? 16 : 32;    // words of the k of a unit
  static constexpr int PAD = HALF ? 8 : 16;      // words behind a row in shared memory, which put the lanes of a load into different banks
  static_assert(PARTS == 1 || BF16 && !HALF, "rests are parted in bf16");

  static TC_DEVICE void parts(uint32_t (&b)[PARTS][2], const float (&run)[RUN]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (HALF) {
        b[0][i] = as_bits(run[i]);
        continue;
      }
      float x = run[2 * i % RUN], y = run[(2 * i + 1) % RUN];
#pragma unroll
      for (int part = 0; part + 1 < PARTS; ++part) {
        const uint32_t bits[2] = {as_bits(x), as_bits(y)};
        b[part][i] = (bits[1] & 0xffff0000u) | bits[0] >> 16;
        x -= as_float(bits[0] & 0xffff0000u), y -= as_float(bits[1] & 0xffff0000u);
      }
      b[PARTS - 1][i] = BF16 ? pack_bf16(x, y) : pack_fp16(x, y);
    }
  }
};

// c += (scales of the four columns) * (W^T X^T) for a tile of 16 columns each: the sums of a unit, or of half of it.
TC_DEVICE void add_scaled(float (&c)[2][4], const float (&sum)[2][4], const Float4& scales) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = fmaf(scales.v[2 * i + e / 2], sum[i][e], c[i][e]);
}

// A unit of codes in registers, as fragments.
template <class A, class W> struct Fragments {
  uint32_t a[2][2][4];  // step, tile
  TC_DEVICE void unpack(const UnitCodes<W::BITS>& codes, const uint32_t (&zero_bytes)[W::SUMS]) {
    using C = Codes<W::BITS, A::BF16>;
    uint32_t zeros[4];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (W::ZEROS && step < W::SUMS) zeros[i] = C::zero(zero_bytes[step % W::SUMS] >> 8 * i & 0xff);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) C::template fragment<W::ZEROS>(a[step][tile], codes, tile, step, zeros);
    }
  }
  // c += the unit times 8 rows of X, of which run(step) gives a lane's words
  template <class Run> TC_DEVICE void multiply(float (&c)[2][4], const Float4 (&scales)[W::SUMS], const Run& run) const {
    float sum[2][4] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t b[A::PARTS][2];
      float words[A::RUN];
      run(words, step);
      A::parts(b, words);
#pragma unroll
      for (int part = A::PARTS - 1; part >= 0; --part)
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
          mma_half<A::BF16>(sum[tile], a[step][tile][0], a[step][tile][1], a[step][tile][2], a[step][tile][3], b[part][0], b[part][1]);
      if (W::SUMS == 2 || step == 1) {
        add_scaled(c, sum, scales[step % W::SUMS]);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e / 4][e % 4] = 0.0f;
      }
    }
  }
};

// ---- few rows ------------------------------------------------------------------------------------------------------------------------------------------
// What a lane wants of a unit, straight from memory.
template <class W> struct Fetched {
  UnitCodes<W::BITS> codes;
  Float4 scales[W::SUMS];
  uint32_t zeros[W::SUMS];
  TC_DEVICE void load(const W& w, int strip, int unit, int lane) {
    codes.load(w.at(strip, unit), lane);
#pragma unroll
    for (int i = 0; i < W::SUMS; ++i) {
      const size_t group = w.group(strip, unit, i) + lane / 4 * 4;
      scales[i] = *reinterpret_cast<const Float4*>(w.scales + group);
      if (W::ZEROS) zeros[i] = *reinterpret_cast<const uint32_t*>(w.zeros + group);
    }
  }
};

// out [rows][N] = value(row, column, sum) for at most 8 rows and the 32 columns of a strip; its warps take turns at the units first .. last, DEPTH of them on their way, and their sums are
// added up in the order of the warps. VEC: words per load of X.
template <class A, class W, int WARPS, int DEPTH, int VEC, class X, class Out, class Value>
TC_DEVICE void weight_only_few(const W& w, const X& x, const Out& out, int rows, int strip, int first, int last, const Value& value) {
  constexpr int LD = 36;  // floats of a row of sums: the four lanes of a column are stored to different banks
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float c[2][4] = {};
  Fetched<W> ahead[DEPTH];
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (first + warp + d * WARPS < last) ahead[d].load(w, strip, first + warp + d * WARPS, lane);
#pragma unroll 1
  for (int base = first + warp; base < last; base += WARPS * DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int unit = base + d * WARPS;
      if (unit >= last) break;
      const Fetched<W> now = ahead[d];
      if (unit + WARPS * DEPTH < last) ahead[d].load(w, strip, unit + WARPS * DEPTH, lane);
      Fragments<A, W> fragments;
      fragments.unpack(now.codes, now.zeros);
      fragments.multiply(c, now.scales, [&](float (&words)[A::RUN], int step) {
        constexpr int WIDTH = VEC < A::RUN ? VEC : A::RUN;
        struct alignas(4 * WIDTH) Part { float v[WIDTH]; };
#pragma unroll
        for (int i = 0; i < A::RUN; i += WIDTH) {
          const float* from = x.at(g, unit * A::UNIT + step * (A::UNIT / 2) + t * A::RUN + i);
          const Part part = from ? *reinterpret_cast<const Part*>(from) : Part{};
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) words[i + j] = part.v[j];
        }
      });
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) *reinterpret_cast<Float4*>(shared + (warp * 8 + 2 * t + r) * LD + 4 * g) = {c[0][r], c[0][r + 2], c[1][r], c[1][r + 2]};
  __syncthreads();
#pragma unroll
  for (int place = threadIdx.x; place < rows * 16; place += 32 * WARPS) {
    const int m = place / 16, column = place % 16 * 2;
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum[0] += shared[(i * 8 + m) * LD + column], sum[1] += shared[(i * 8 + m) * LD + column + 1];
    put<W::N>(out, (size_t)m * W::N, strip * 32 + column, [&](int e) { return value(m, strip * 32 + column + e, sum[e]); });
  }
}
// The same for M rows.
template <class A, class W, int M, int WARPS, int DEPTH, int VEC, class X, class Out, class Value>
TC_DEVICE void weight_only_few(const W& w, const X& x, const Out& out, int strip, int first, int last, const Value& value) {
  weight_only_few<A, W, WARPS, DEPTH, VEC>(w, x, out, M, strip, first, last, value);
}

// ---- many rows -----------------------------------------------------------------------------------------------------------------------------------------
// A block makes BM x 32 WARPS of C, a strip per warp; STAGES steps of 32 words of X, and of the units of W that belong to them, are in flight. A warp copies its own codes to
// where its own lanes read them. The padding of the rows of X puts the lanes of every load into different banks.
template <class A, class W, int BM_, int WARPS_, int STAGES_> struct Strips {
  static constexpr int BM = BM_, WARPS = WARPS_, STAGES = STAGES_, BK = 32, THREADS = 32 * WARPS;
  static constexpr int UNITS = BK / A::UNIT, LDA = BK + A::PAD;
  static constexpr int X_FLOATS = BM * LDA;
  static constexpr int CODES = UNITS * W::BITS * 32, SCALES = UNITS * W::SUMS * 32, ZEROS = W::ZEROS ? UNITS * W::SUMS * 8 : 0;
  static constexpr int WARP_FLOATS = CODES + SCALES + ZEROS, STAGE_FLOATS = X_FLOATS + WARPS * WARP_FLOATS;
};

// Writes a warp's sums of rows m0 .. of a strip: c[i][tile][r + 2 e] is that of row 8 i + 2 t + r and column 4 g + 2 tile + e.
template <int N, int TILES, class Out, class Value> TC_DEVICE void put_strip(const Out& out, int rows, int m0, int strip, const float (&c)[TILES][2][4], const Value& value) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < TILES; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int m = m0 + i * 8 + 2 * t + r, n = strip * 32 + 4 * g + 2 * tile;
        if (m < rows) put<N>(out, (size_t)m * N, n, [&](int e) { return value(m, n + e, c[i][tile][r + 2 * e]); });
      }
}

// out [m0 ..][strip ..] = value(row, column, sum) over the units first .. last; a part of them ends at whole steps, or at the end.
template <class A, class W, class T, int VEC, class X, class Out, class Value>
TC_DEVICE void weight_only_many(const W& w, const X& x, const Out& out, int rows, int m0, int strip0, int first, int last, const Value& value) {
  TC_SHARED(float, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int strip = strip0 + warp, steps = (last - first + T::UNITS - 1) / T::UNITS;
  const bool live = strip * 32 < W::N;
  float c[T::BM / 8][2][4] = {};
  auto fill = [&](int step) {
    float* slot = shared + step % T::STAGES * T::STAGE_FLOATS;
    stage<T::BM, T::BK, T::LDA, T::THREADS, VEC>(slot, x, m0, first * A::UNIT + step * T::BK);
    float* own = slot + T::X_FLOATS + warp * T::WARP_FLOATS;
#pragma unroll
    for (int u = 0; u < T::UNITS; ++u) {
      const int unit = first + step * T::UNITS + u;
      const bool there = live && unit < last;
#pragma unroll
      for (int i = 0; i < W::BITS * 32; i += 128)
        if (i + 128 <= W::BITS * 32 || lane < W::BITS % 4 * 8) copy_async<16>(own + u * W::BITS * 32 + i + lane * 4, there ? w.at(strip, unit) + i + lane * 4 : nullptr, w.scales);
#pragma unroll
      for (int i = 0; i < W::SUMS; ++i) {
        const size_t group = there ? w.group(strip, unit, i) : 0;
        if (lane < 8) copy_async<16>(own + T::CODES + (u * W::SUMS + i) * 32 + lane * 4, there ? w.scales + group + lane * 4 : nullptr, w.scales);
        if (W::ZEROS && lane >= 8 && lane < 10)
          copy_async<16>(own + T::CODES + T::SCALES + (u * W::SUMS + i) * 8 + (lane - 8) * 4, there ? words(w.zeros + group) + (lane - 8) * 4 : nullptr, w.scales);
      }
    }
  };
  in_stages<T::STAGES>(steps, fill, [&](int step) {
    const float* xs = shared + step % T::STAGES * T::STAGE_FLOATS;
    const float* own = xs + T::X_FLOATS + warp * T::WARP_FLOATS;
#pragma unroll
    for (int u = 0; u < T::UNITS; ++u) {
      Fetched<W> unit;
      unit.codes.load(own + u * W::BITS * 32, lane);
#pragma unroll
      for (int i = 0; i < W::SUMS; ++i) {
        unit.scales[i] = *reinterpret_cast<const Float4*>(own + T::CODES + (u * W::SUMS + i) * 32 + g * 4);
        if (W::ZEROS) unit.zeros[i] = as_bits(own[T::CODES + T::SCALES + (u * W::SUMS + i) * 8 + g]);
      }
      Fragments<A, W> fragments;
      fragments.unpack(unit.codes, unit.zeros);
#pragma unroll
      for (int i = 0; i < T::BM / 8; ++i)
        fragments.multiply(c[i], unit.scales, [&](float (&words)[A::RUN], int step16) {
          struct alignas(4 * A::RUN) Run { float v[A::RUN]; };
          const Run run = *reinterpret_cast<const Run*>(xs + (i * 8 + g) * T::LDA + u * A::UNIT + step16 * (A::UNIT / 2) + t * A::RUN);
#pragma unroll
          for (int j = 0; j < A::RUN; ++j) words[j] = run.v[j];
        });
    }
  });
  put_strip<W::N>(out, rows, m0, strip, c, value);
}
// The same for M rows.
template <class A, class W, class T, int M, int VEC, class X, class Out, class Value>
TC_DEVICE void weight_only_many(const W& w, const X& x, const Out& out, int m0, int strip0, int first, int last, const Value& value) {
  weight_only_many<A, W, T, VEC>(w, x, out, M, m0, strip0, first, last, value);
}

}  // namespace tc
