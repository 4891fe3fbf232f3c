// Stages of a dataflow network for Vitis HLS. Every number is an integer; the arithmetic is that of the integer reference, bit for bit.
// Streams carry words of L elements. A stage reads all elements of its tensors and writes all of its result, once per call.
#ifndef TC_HLS_H
#define TC_HLS_H
#ifdef TC_SIM  // C simulation without Vitis
#include "sim_ap_int.h"
#include "sim_hls_stream.h"
#else
#include "ap_int.h"
#include "hls_stream.h"
#endif

typedef ap_uint<8> tc_u8;

template <class T, int L>
struct tc_word {
    T v[L];
};

// clip(round(acc * multiplier / 2^SHIFT) + ZERO, LOW, HIGH), half up
template <int ACC, int SHIFT, int ZERO, int LOW, int HIGH>
tc_u8 tc_requantise(ap_int<ACC> acc, ap_uint<17> multiplier) {
#pragma HLS INLINE
    ap_int<ACC + 18> product = acc * multiplier;
    long long value = (((long long)product + (1LL << (SHIFT - 1))) >> SHIFT) + ZERO;
    return tc_u8(value < LOW ? LOW : value > HIGH ? HIGH : (int)value);
}

// What leaves a matrix-vector stage: levels, or the sums themselves.
template <bool RAW, int ACC, int SHIFT, int ZERO, int LOW, int HIGH>
struct tc_result {
    typedef tc_u8 type;
    static type of(ap_int<ACC> acc, ap_uint<17> multiplier) {
#pragma HLS INLINE
        return tc_requantise<ACC, SHIFT, ZERO, LOW, HIGH>(acc, multiplier);
    }
};
template <int ACC, int SHIFT, int ZERO, int LOW, int HIGH>
struct tc_result<true, ACC, SHIFT, ZERO, LOW, HIGH> {
    typedef ap_int<32> type;
    static type of(ap_int<ACC> acc, ap_uint<17>) { return type(acc); }
};

// y[r][n] = result(bias[n] + sum of x[r][k] * w[n][k]). PE outputs and SIMD products a cycle; of every GROUP inputs NZ have a weight (dense: 1 of 1).
// A table entry is a signed byte of weight, and above it the place of its input in the group. One cycle per step, ROWS * N / PE * STEPS in all.
template <class RESULT, int ROWS, int K, int N, int PE, int SIMD, int NZ, int GROUP, int ENTRY, int ACC>
void tc_matvec(hls::stream<tc_word<tc_u8, (SIMD >= NZ ? SIMD / NZ : 1) * GROUP> >& in, hls::stream<tc_word<typename RESULT::type, PE> >& out,
               const ap_uint<ENTRY> table[N / PE * (K / GROUP * NZ / SIMD)][PE * SIMD], const ap_int<32> bias[N / PE][PE],
               const ap_uint<17> multiplier[N / PE][PE]) {
#pragma HLS INLINE
    const int LANES = (SIMD >= NZ ? SIMD / NZ : 1) * GROUP, HOLD = SIMD >= NZ ? 1 : NZ / SIMD, STEPS = K / GROUP * NZ / SIMD;
    tc_word<tc_u8, LANES> row[K / LANES], x;
    ap_int<ACC> acc[PE];
#pragma HLS ARRAY_PARTITION variable=acc complete
    for (int r = 0; r < ROWS; ++r)
        for (int fold = 0; fold < N / PE; ++fold)
            for (int t = 0; t < STEPS; ++t) {
#pragma HLS PIPELINE II=1
                if (fold == 0 && t % HOLD == 0)
                    row[t / HOLD] = in.read();
                x = row[t / HOLD];
                tc_word<typename RESULT::type, PE> y;
                for (int p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                    ap_int<ACC> sum = t == 0 ? ap_int<ACC>(bias[fold][p]) : acc[p];
                    for (int s = 0; s < SIMD; ++s) {
#pragma HLS UNROLL
                        ap_uint<ENTRY> entry = table[fold * STEPS + t][p * SIMD + s];
                        int place = (SIMD >= NZ ? s / NZ : 0) * GROUP + (int)(entry >> 8);
                        ap_int<8> weight = (int)(entry & 255);
                        ap_int<17> product = (int)x.v[place] * (int)weight;
                        sum += product;
                    }
                    acc[p] = sum;
                    y.v[p] = RESULT::of(sum, multiplier[fold][p]);
                }
                if (t == STEPS - 1)
                    out.write(y);
            }
}

// Words of LI elements to words of LO; one of the two divides the other.
template <class T, int COUNT, int LI, int LO>
void tc_convert(hls::stream<tc_word<T, LI> >& in, hls::stream<tc_word<T, LO> >& out) {
#pragma HLS INLINE
    const int STEP = LI < LO ? LI : LO;
    tc_word<T, LI> x;
    tc_word<T, LO> y;
    for (int i = 0; i < COUNT; i += STEP) {
#pragma HLS PIPELINE II=1
        if (i % LI == 0)
            x = in.read();
        for (int l = 0; l < STEP; ++l) {
#pragma HLS UNROLL
            y.v[i % LO + l] = x.v[i % LI + l];
        }
        if (i % LO == LO - STEP)
            out.write(y);
    }
}

// Windows of an image [H][W][C], one after the other; pixels outside have the value FILL. The last KH rows are kept.
template <int H, int W, int C, int KH, int KW, int SH, int SW, int TOP, int LEFT, int HO, int WO, int FILL, int L>
void tc_window(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out) {
#pragma HLS INLINE
    tc_word<tc_u8, L> line[KH][W * C / L];
    int have = 0;
    for (int oy = 0; oy < HO; ++oy) {
        int need = oy * SH + KH - TOP;
        for (; have < (need < H ? need : H); ++have)
            for (int i = 0; i < W * C / L; ++i) {
#pragma HLS PIPELINE II=1
                line[have % KH][i] = in.read();
            }
        for (int ox = 0; ox < WO; ++ox)
            for (int ky = 0; ky < KH; ++ky)
                for (int kx = 0; kx < KW; ++kx)
                    for (int c = 0; c < C / L; ++c) {
#pragma HLS PIPELINE II=1
                        int iy = oy * SH + ky - TOP, ix = ox * SW + kx - LEFT;
                        tc_word<tc_u8, L> y;
                        if (iy >= 0 && iy < H && ix >= 0 && ix < W)
                            y = line[iy % KH][ix * (C / L) + c];
                        else
                            for (int l = 0; l < L; ++l)
                                y.v[l] = FILL;
                        out.write(y);
                    }
    }
    for (; have < H; ++have)
        for (int i = 0; i < W * C / L; ++i)
            in.read();
}

// MAXIMUM: the largest of each window; otherwise requantise(sum + BIAS).
template <bool MAXIMUM, int H, int W, int C, int KH, int KW, int SH, int SW, int TOP, int LEFT, int HO, int WO, int L, int BIAS, int MULTIPLIER,
          int SHIFT, int ZERO, int LOW, int HIGH>
void tc_pool(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out) {
#pragma HLS INLINE
    tc_word<tc_u8, L> line[KH][W * C / L];
    ap_int<32> acc[L];
#pragma HLS ARRAY_PARTITION variable=acc complete
    int have = 0;
    for (int oy = 0; oy < HO; ++oy) {
        int need = oy * SH + KH - TOP;
        for (; have < (need < H ? need : H); ++have)
            for (int i = 0; i < W * C / L; ++i) {
#pragma HLS PIPELINE II=1
                line[have % KH][i] = in.read();
            }
        for (int ox = 0; ox < WO; ++ox)
            for (int c = 0; c < C / L; ++c)
                for (int ky = 0; ky < KH; ++ky)
                    for (int kx = 0; kx < KW; ++kx) {
#pragma HLS PIPELINE II=1
                        int iy = oy * SH + ky - TOP, ix = ox * SW + kx - LEFT;
                        bool inside = iy >= 0 && iy < H && ix >= 0 && ix < W;
                        tc_word<tc_u8, L> y;
                        for (int l = 0; l < L; ++l) {
#pragma HLS UNROLL
                            int x = inside ? (int)line[inside ? iy % KH : 0][inside ? ix * (C / L) + c : 0].v[l] : 0;
                            int before = ky == 0 && kx == 0 ? (MAXIMUM ? 0 : BIAS) : (int)acc[l];
                            int now = MAXIMUM ? (x > before ? x : before) : before + x;
                            acc[l] = now;
                            y.v[l] = MAXIMUM ? tc_u8(now) : tc_requantise<32, SHIFT, ZERO, LOW, HIGH>(now, MULTIPLIER);
                        }
                        if (ky == KH - 1 && kx == KW - 1)
                            out.write(y);
                    }
    }
    for (; have < H; ++have)
        for (int i = 0; i < W * C / L; ++i)
            in.read();
}

// clip(round(((a - ZA) * MA + (b - ZB) * MB) / 2^SHIFT) + ZERO, LOW, HIGH)
template <int COUNT, int L, int ZA, int ZB, int MA, int MB, int SHIFT, int ZERO, int LOW, int HIGH>
void tc_add(hls::stream<tc_word<tc_u8, L> >& a, hls::stream<tc_word<tc_u8, L> >& b, hls::stream<tc_word<tc_u8, L> >& out) {
#pragma HLS INLINE
    for (int i = 0; i < COUNT / L; ++i) {
#pragma HLS PIPELINE II=1
        tc_word<tc_u8, L> x = a.read(), y = b.read(), z;
        for (int l = 0; l < L; ++l) {
#pragma HLS UNROLL
            ap_int<28> left = ((int)x.v[l] - ZA) * (long long)MA, right = ((int)y.v[l] - ZB) * (long long)MB;
            long long value = (((long long)left + (long long)right + (1LL << (SHIFT - 1))) >> SHIFT) + ZERO;
            z.v[l] = tc_u8(value < LOW ? LOW : value > HIGH ? HIGH : (int)value);
        }
        out.write(z);
    }
}

// values[x]
template <int COUNT, int L>
void tc_table(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out, const tc_u8 values[256]) {
#pragma HLS INLINE
    for (int i = 0; i < COUNT / L; ++i) {
#pragma HLS PIPELINE II=1
        tc_word<tc_u8, L> x = in.read(), y;
        for (int l = 0; l < L; ++l) {
#pragma HLS UNROLL
            y.v[l] = values[(int)x.v[l]];
        }
        out.write(y);
    }
}

// y[b][m][n] = requantise(sum of (A[b][m][k] - ZA) * (B[b][n][k] - ZB)). B is read whole, then the rows of A as they come.
template <int BATCH, int M, int N, int K, int PE, int SIMD, int ACC, int ZA, int ZB, int MULTIPLIER, int SHIFT, int ZERO, int LOW, int HIGH>
void tc_matmul(hls::stream<tc_word<tc_u8, SIMD> >& a, hls::stream<tc_word<tc_u8, SIMD> >& b, hls::stream<tc_word<tc_u8, PE> >& out) {
#pragma HLS INLINE
    tc_word<tc_u8, SIMD> kept[N / PE][K / SIMD][PE], row[K / SIMD], x;
#pragma HLS ARRAY_RESHAPE variable=kept dim=3 complete
    ap_int<ACC> acc[PE];
#pragma HLS ARRAY_PARTITION variable=acc complete
    for (int batch = 0; batch < BATCH; ++batch) {
        for (int n = 0; n < N; ++n)
            for (int t = 0; t < K / SIMD; ++t) {
#pragma HLS PIPELINE II=1
                kept[n / PE][t][n % PE] = b.read();
            }
        for (int m = 0; m < M; ++m)
            for (int fold = 0; fold < N / PE; ++fold)
                for (int t = 0; t < K / SIMD; ++t) {
#pragma HLS PIPELINE II=1
                    if (fold == 0)
                        row[t] = a.read();
                    x = row[t];
                    tc_word<tc_u8, PE> y;
                    for (int p = 0; p < PE; ++p) {
#pragma HLS UNROLL
                        ap_int<ACC> sum = t == 0 ? ap_int<ACC>(0) : acc[p];
                        for (int s = 0; s < SIMD; ++s) {
#pragma HLS UNROLL
                            ap_int<9> left = (int)x.v[s] - ZA, right = (int)kept[fold][t][p].v[s] - ZB;
                            ap_int<18> product = (int)left * (int)right;
                            sum += product;
                        }
                        acc[p] = sum;
                        y.v[p] = tc_requantise<ACC, SHIFT, ZERO, LOW, HIGH>(sum, MULTIPLIER);
                    }
                    if (t == K / SIMD - 1)
                        out.write(y);
                }
    }
}

// Softmax over rows: exponentials from a table of exp(-scale * d), one reciprocal a row; the result has scale 1/255.
template <int ROWS, int T, int L>
void tc_softmax(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out, const ap_uint<16> exponential[256]) {
#pragma HLS INLINE
    tc_word<tc_u8, L> row[T / L];
    for (int r = 0; r < ROWS; ++r) {
        int largest = 0;
        for (int i = 0; i < T / L; ++i) {
#pragma HLS PIPELINE II=1
            tc_word<tc_u8, L> x = in.read();
            row[i] = x;
            for (int l = 0; l < L; ++l)
                largest = (int)x.v[l] > largest ? (int)x.v[l] : largest;
        }
        long long total = 0;
        for (int i = 0; i < T / L; ++i) {
#pragma HLS PIPELINE II=1
            for (int l = 0; l < L; ++l)
                total += (int)exponential[largest - (int)row[i].v[l]];
        }
        ap_uint<24> reciprocal = (255LL << 30) / total;
        for (int i = 0; i < T / L; ++i) {
#pragma HLS PIPELINE II=1
            tc_word<tc_u8, L> y;
            for (int l = 0; l < L; ++l) {
#pragma HLS UNROLL
                long long value = ((int)exponential[largest - (int)row[i].v[l]] * (long long)reciprocal + (1LL << 29)) >> 30;
                y.v[l] = value > 255 ? 255 : (int)value;
            }
            out.write(y);
        }
    }
}

// Layer norm over rows: (D x - sum) / sqrt(D sum(x^2) - sum^2 + EPSILON), times gamma, plus beta. One square root and one reciprocal a row.
template <int ROWS, int D, int L, int SHIFT, int ZERO>
void tc_norm(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out, long long epsilon, const ap_int<18> gamma[D / L][L],
             const ap_int<42> beta[D / L][L]) {
#pragma HLS INLINE
    tc_word<tc_u8, L> row[D / L];
    for (int r = 0; r < ROWS; ++r) {
        long long total = 0, squares = 0;
        for (int i = 0; i < D / L; ++i) {
#pragma HLS PIPELINE II=1
            tc_word<tc_u8, L> x = in.read();
            row[i] = x;
            for (int l = 0; l < L; ++l) {
                total += (int)x.v[l];
                squares += (int)x.v[l] * (int)x.v[l];
            }
        }
        long long variance = D * squares - total * total + epsilon;
        int bits = 0;
        for (int i = 0; i < 56; ++i)
            if (variance >> i & 1)
                bits = i + 1;
        int k = bits >= 48 ? 0 : (48 - bits) / 2 > 12 ? 12 : (48 - bits) / 2;
        long long value = variance << 2 * k, root = 0;
        for (int i = 27; i >= 0; --i) {
#pragma HLS PIPELINE
            long long next = root | 1LL << i;
            if (next * next <= value)
                root = next;
        }
        long long reciprocal = (1LL << 40) / root;
        for (int i = 0; i < D / L; ++i) {
#pragma HLS PIPELINE II=1
            tc_word<tc_u8, L> y;
            for (int l = 0; l < L; ++l) {
#pragma HLS UNROLL
                long long centred = D * (long long)(int)row[i].v[l] - total;
                long long normal = (centred * reciprocal + (1LL << (27 - k))) >> (28 - k);
                long long scaled = normal * (long long)gamma[i][l] + (long long)beta[i][l];
                long long level = ((scaled + (1LL << (SHIFT - 1))) >> SHIFT) + ZERO;
                y.v[l] = level < 0 ? 0 : level > 255 ? 255 : (int)level;
            }
            out.write(y);
        }
    }
}

// out[i] = x[index[i]], in words
template <int COUNT, int OUT, int L, int BITS>
void tc_reorder(hls::stream<tc_word<tc_u8, L> >& in, hls::stream<tc_word<tc_u8, L> >& out, const ap_uint<BITS> index[OUT / L]) {
#pragma HLS INLINE
    tc_word<tc_u8, L> kept[COUNT / L];
    for (int i = 0; i < COUNT / L; ++i) {
#pragma HLS PIPELINE II=1
        kept[i] = in.read();
    }
    for (int i = 0; i < OUT / L; ++i) {
#pragma HLS PIPELINE II=1
        out.write(kept[(int)index[i]]);
    }
}
#endif
