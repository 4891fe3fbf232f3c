// Depthwise convolution of an NHWC image: a thread makes TH x TW neighbouring outputs of V neighbouring channels.
#pragma once
#include "tcompile.cuh"

namespace tc {

// Neighbours that one instruction moves; up to 16 bytes.
template <class T, int V> struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Several { T v[V]; };

template <int V, class T> TC_DEVICE void put_several(T* to, const T (&values)[V]) {
  Several<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = values[i];
  *reinterpret_cast<Several<T, V>*>(to) = pack;
}
template <int V, class T, class Rounded, class Value> TC_DEVICE void put_channels(const To<T, Rounded>& out, size_t at, const Value& value) {
  T values[V];
  Rounded rounded[V];
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = value(i), rounded[i] = values[i];
  put_several(out.data + at, values);
  put_several(out.rounded + at, rounded);
}
template <int V, class T, class Value> TC_DEVICE void put_channels(const To<T, void>& out, size_t at, const Value& value) {
  T values[V];
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = value(i);
  put_several(out.data + at, values);
}

template <int H_, int W_, int C_, int OH_, int OW_, int KH_, int KW_, int SH_, int SW_, int TOP_, int LEFT_, int DH_, int DW_> struct Channels {
  static constexpr int H = H_, W = W_, C = C_, OH = OH_, OW = OW_, KH = KH_, KW = KW_, SH = SH_, SW = SW_, TOP = TOP_, LEFT = LEFT_, DH = DH_, DW = DW_;
};

// The same where the image's extent is known while running.
template <int C_, int KH_, int KW_, int SH_, int SW_, int TOP_, int LEFT_, int DH_, int DW_> struct OpenChannels {
  static constexpr int C = C_, KH = KH_, KW = KW_, SH = SH_, SW = SW_, TOP = TOP_, LEFT = LEFT_, DH = DH_, DW = DW_;
  int H, W, OH, OW;
};

// TH x TW outputs from (oh, ow) of image n on, V channels from c on. Rows of the image that the TH outputs share are read once, and so are the columns of a row that the TW outputs share. All loops are
// unrolled: what a tap is not for is decided at compile time. out [pixels][C] = value(pixel, channel, sum).
template <class I, int V, int TH, int TW, class Sum, class X, class Weight, class Out, class Value>
TC_DEVICE void depthwise_tile(const I& image, const X* __restrict__ x, const Weight* __restrict__ w, const Out& out, int n, int oh, int ow, int c, const Value& value) {
  constexpr int ROWS = (TH - 1) * I::SH + (I::KH - 1) * I::DH + 1, COLUMNS = (TW - 1) * I::SW + (I::KW - 1) * I::DW + 1;
  const int top = oh * I::SH - I::TOP, left = ow * I::SW - I::LEFT;
  // one address for all pixels of a thread, which are constant distances from it; outside of the image it is not read
  const X* const first = x + ((ptrdiff_t)(n * image.H + top) * image.W + left) * I::C + c;
  const Weight* const own = w + c;
  Several<Weight, V> taps[I::KH][I::KW];
  Sum sums[TH][TW][V] = {};
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    bool used = false;  // of stride or dilation: rows between
#pragma unroll
    for (int t = 0; t < TH; ++t) {
      const int kh = i - t * I::SH;
      if (kh < 0 || kh % I::DH || kh / I::DH >= I::KH) continue;
      used = true;
      if (t == 0)  // the first row of outputs is the first to see a row of taps
#pragma unroll
        for (int k = 0; k < I::KW; ++k) taps[kh / I::DH][k] = *reinterpret_cast<const Several<Weight, V>*>(own + (kh / I::DH * I::KW + k) * I::C);
    }
    if (!used) continue;
    const bool inside = (unsigned)(top + i) < (unsigned)image.H;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      bool read = false;
#pragma unroll
      for (int u = 0; u < TW; ++u) read = read || (j >= u * I::SW && (j - u * I::SW) % I::DW == 0 && (j - u * I::SW) / I::DW < I::KW);
      if (!read) continue;
      Several<X, V> pixel = {};
      if (inside && (unsigned)(left + j) < (unsigned)image.W) pixel = *reinterpret_cast<const Several<X, V>*>(first + (i * image.W + j) * I::C);
#pragma unroll
      for (int u = 0; u < TW; ++u) {
        const int kw = j - u * I::SW;
        if (kw < 0 || kw % I::DW || kw / I::DW >= I::KW) continue;
#pragma unroll
        for (int t = 0; t < TH; ++t) {
          const int kh = i - t * I::SH;
          if (kh < 0 || kh % I::DH || kh / I::DH >= I::KH) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) sums[t][u][v] += (Sum)pixel.v[v] * (Sum)taps[kh / I::DH][kw / I::DW].v[v];
        }
      }
    }
  }
#pragma unroll
  for (int t = 0; t < TH; ++t)
#pragma unroll
    for (int u = 0; u < TW; ++u) {
      if (oh + t >= image.OH || ow + u >= image.OW) continue;
      const int pixel = (n * image.OH + oh + t) * image.OW + ow + u;
      put_channels<V>(out, (size_t)pixel * I::C + c, [&](int v) { return value(pixel, c + v, sums[t][u][v]); });
    }
}

// Number `thread` of N x ceil(OH / TH) x ceil(OW / TW) x C / V, channels fastest, so that a warp reads neighbours.
template <class I, int N, int V, int TH, int TW, class Sum, class X, class Weight, class Out, class Value>
TC_DEVICE void depthwise(const X* __restrict__ x, const Weight* __restrict__ w, const Out& out, int thread, const Value& value) {
  constexpr int PER_ROW = I::C / V, WIDE = (I::OW + TW - 1) / TW, HIGH = (I::OH + TH - 1) / TH;
  if (thread >= N * HIGH * WIDE * PER_ROW) return;
  const int c = thread % PER_ROW * V, ow = thread / PER_ROW % WIDE * TW, oh = thread / (PER_ROW * WIDE) % HIGH * TH, n = thread / (PER_ROW * WIDE * HIGH);
  depthwise_tile<I, V, TH, TW, Sum>(I{}, x, w, out, n, oh, ow, c, value);
}
// The same for sizes that are known while running: high x wide tiles of each of so many images; they are int or Size.
template <class I, int V, int TH, int TW, class Sum, class High, class Wide, class X, class Weight, class Out, class Value>
TC_DEVICE void depthwise(const I& image, int images, const High& high, const Wide& wide, const X* __restrict__ x, const Weight* __restrict__ w, const Out& out, int thread, const Value& value) {
  constexpr int PER_ROW = I::C / V;
  const int column = thread / PER_ROW, row = column / wide, n = row / high;
  if (n < images) depthwise_tile<I, V, TH, TW, Sum>(image, x, w, out, n, row % high * TH, column % wide * TW, thread % PER_ROW * V, value);
}

}  // namespace tc
