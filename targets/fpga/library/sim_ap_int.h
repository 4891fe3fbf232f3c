// Integers of W bits for C simulation without Vitis: values wrap to their width, as in hardware. Vitis HLS brings its own ap_int.h; this one is not for synthesis.
#ifndef TC_SIM_AP_INT_H
#define TC_SIM_AP_INT_H
#include <cstdint>
#include <type_traits>

template <int W, bool SIGNED>
class tc_sim_int {
    static_assert(W >= 1 && W <= 64, "1 to 64 bits");
    typedef typename std::conditional<(W <= 8), int8_t, typename std::conditional<(W <= 16), int16_t, typename std::conditional<(W <= 32), int32_t, int64_t>::type>::type>::type storage;
    storage bits;

public:
    tc_sim_int() : bits(0) {}
    tc_sim_int(long long value) : bits((storage)value) { *this = value; }
    template <int V, bool S>
    tc_sim_int(const tc_sim_int<V, S>& other) { *this = (long long)other; }
    tc_sim_int& operator=(long long value) {
        unsigned long long low = (unsigned long long)value << (64 - W);
        bits = (storage)(SIGNED ? (long long)low >> (64 - W) : (long long)(low >> (64 - W)));
        return *this;
    }
    operator long long() const {
        unsigned long long low = (unsigned long long)(long long)bits << (64 - W);
        return SIGNED ? (long long)low >> (64 - W) : (long long)(low >> (64 - W));
    }
    tc_sim_int& operator+=(long long value) { return *this = (long long)*this + value; }
};

template <int W>
struct ap_int : tc_sim_int<W, true> {
    ap_int() {}
    ap_int(long long value) : tc_sim_int<W, true>(value) {}
    template <int V, bool S>
    ap_int(const tc_sim_int<V, S>& other) : tc_sim_int<W, true>((long long)other) {}
};
template <int W>
struct ap_uint : tc_sim_int<W, false> {
    ap_uint() {}
    ap_uint(long long value) : tc_sim_int<W, false>(value) {}
    template <int V, bool S>
    ap_uint(const tc_sim_int<V, S>& other) : tc_sim_int<W, false>((long long)other) {}
};
#endif
