// Products by constant weights of which whole tiles are zero: tc::gemm and tc::gemm_hopper over the tiles that are kept, instead of all of K.
//
// Weights (targets/cuda/blocks.py packs them) are a row of the walk per strip of columns, the strip of most tiles first, and behind these rows the kept tiles alone, those of a strip one
// after the other. A row is {strip, tiles that it keeps, tiles before its first one, 0, then where along K each of them lies}, filled up to 128 bytes.
#pragma once
#include "hopper.cuh"

namespace tc {

// What a block takes of row `number`: the tiles of one of PARTS parts of about equal length, `length` of them from `first` on, which lie in K at `places`, in units of a tile.
template <int STRIPS, int UNITS, int PARTS> struct Walk {
  static constexpr int ROW = (4 + UNITS + 31) / 32 * 32, HEADER = STRIPS * ROW, END = UNITS;  // words; the place behind K
  const int *tiles, *places;
  int strip, first, length;
  TC_DEVICE Walk(const int* weights, int number, int part) : tiles(weights + HEADER) {
    const int* row = weights + number * ROW;
    const int from = row[1] * part / PARTS, to = row[1] * (part + 1) / PARTS;
    strip = row[0];
    first = row[2] + from;
    length = to - from;
    places = row + 4 + from;
  }
  TC_DEVICE int place(int tile) const { return tile < length ? places[tile] : END; }
};

// Rows of COLUMNS words.
template <int COLUMNS> struct KeptRows {
  const float* data;
  int rows;
  TC_DEVICE const float* at(int r, int c) const { return r < rows ? data + (size_t)r * COLUMNS + c : nullptr; }
};

// out[m0.., the strip's columns] [rows][N] = value(row, column, sum). A tile is 16 words of k, [16][BN]; a step takes two. VA: words per copy of A.
template <class P, class T, int N, int VA, class W, class Source, class Out, class Value>
TC_DEVICE void gemm_blocks(const Source& a, const W& w, const Out& out, int rows, int m0, const Value& value) {
  constexpr int UNIT = 16, PER_STEP = T::BK / UNIT;
  const KeptRows<T::BN> b{words(w.tiles) + (size_t)w.first * (UNIT * T::BN), w.length * UNIT};
  int next[PER_STEP];  // places of the step that is asked for next, read a step before
#pragma unroll
  for (int u = 0; u < PER_STEP; ++u) next[u] = w.place(u);
  auto bring = [&](float* as, float* bs, int step) {
#pragma unroll
    for (int u = 0; u < PER_STEP; ++u) stage<T::BM, UNIT, T::LDA, T::THREADS, VA>(as + u * UNIT, a, m0, next[u] * UNIT);
    stage<T::BK, T::BN, T::LDB, T::THREADS, 4>(bs, b, step * T::BK, 0);
#pragma unroll
    for (int u = 0; u < PER_STEP; ++u) next[u] = w.place((step + 1) * PER_STEP + u);
  };
  gemm_steps<P, T>((w.length + PER_STEP - 1) / PER_STEP, bring, out, rows, N, N, m0, w.strip * T::BN, value);
}

// A source whose steps are those of a list.
template <class Source> struct Listed {
  const Source& source;
  const int* places;
  TC_DEVICE void bring(void* to, int step, uint64_t* barrier) const { source.bring(to, places[step], barrier); }
};

// Tiles of ROWS rows of 32 words, one after the other from row `row` of a map on.
template <int ROWS> struct MappedTiles {
  const TensorMap& map;
  int row;
  TC_DEVICE void bring(void* to, int step, uint64_t* barrier) const { copy_tile(to, map, 0, row + step * ROWS, barrier); }
};

// The same by wgmma. A tile is 32 words of k, [BN][32]; a row of the map is 32 words of the weights, those of the walk included.
template <class P, class T, int N, class W, class Source, class Out, class Value>
TC_DEVICE void gemm_hopper_blocks(const Source& a, const TensorMap& weights, const W& w, const Out& out, int rows, int m0, const Value& value) {
  const MappedTiles<T::BN> b{weights, W::HEADER / 32 + w.first * T::BN};
  gemm_hopper<P, T, N>(Listed<Source>{a, w.places}, b, out, rows, m0, w.strip * T::BN, 0, w.length, value);
}

}  // namespace tc
