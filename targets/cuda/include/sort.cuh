// Sorting: entries of a key and the place that it came from, which no two of a row have in common. Their order is total, so that any way to sort them keeps equal keys in order.
#pragma once
#include "tcompile.cuh"

namespace tc {

// The order of numbers as that of unsigned integers: zeros are equal, NaN is the greatest number whatever its sign.
template <class T> TC_DEVICE uint32_t sort_key(T x) { return T(-1) < T(0) ? (uint32_t)x ^ 0x80000000u : (uint32_t)x; }
TC_DEVICE uint32_t sort_key(bool x) { return x; }
TC_DEVICE uint32_t sort_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = x == 0.0f ? 0u : as_bits(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
TC_DEVICE uint32_t sort_key(float16 x) { return sort_key((float)x); }
TC_DEVICE uint32_t sort_key(bfloat16 x) { return sort_key((float)x); }
TC_DEVICE uint64_t sort_key(unsigned long long x) { return x; }
TC_DEVICE uint64_t sort_key(long long x) { return (uint64_t)x ^ 0x8000000000000000u; }
TC_DEVICE uint64_t sort_key(double x) {
  if (x != x) return ~(uint64_t)0;
  const uint64_t bits = x == 0.0 ? 0 : double_bits(x);
  return bits ^ (bits >> 63 ? ~(uint64_t)0 : 0x8000000000000000u);
}

struct Entry32 {
  uint64_t word;
  static TC_DEVICE Entry32 of(uint32_t key, int place) { return {(uint64_t)key << 32 | (uint32_t)place}; }
  static TC_DEVICE Entry32 last() { return {~(uint64_t)0}; }  // behind every entry: places are less than 2^31
  TC_DEVICE uint32_t key() const { return (uint32_t)(word >> 32); }
  TC_DEVICE int place() const { return (int)(uint32_t)word; }
  TC_DEVICE bool operator<(const Entry32& other) const { return word < other.word; }
};
struct alignas(16) Entry64 {
  uint64_t number;
  uint32_t from;
  static TC_DEVICE Entry64 of(uint64_t key, int place) { return {key, (uint32_t)place}; }
  static TC_DEVICE Entry64 last() { return {~(uint64_t)0, 0xffffffffu}; }
  TC_DEVICE uint64_t key() const { return number; }
  TC_DEVICE int place() const { return (int)from; }
  TC_DEVICE bool operator<(const Entry64& other) const { return number < other.number || (number == other.number && from < other.from); }
};

// Where an entry lies in shared memory: one in 17 is left out, so that threads that take eight neighbours each meet in few banks.
TC_DEVICE int slot(int i) { return i + (i >> 4); }

// LEVELS steps of a bitonic network in registers, of the 2^LEVELS entries `low` apart from `first` on.
template <int LEVELS, class E> TC_DEVICE void exchange(E* entries, int first, int low, bool rising) {
  E e[1 << LEVELS];
#pragma unroll
  for (int i = 0; i < 1 << LEVELS; ++i) e[i] = entries[slot(first + i * low)];
#pragma unroll
  for (int bit = 1 << LEVELS >> 1; bit > 0; bit /= 2)
#pragma unroll
    for (int i = 0; i < 1 << LEVELS; ++i) {
      if (i & bit) continue;
      const E a = e[i], b = e[i | bit];
      const bool change = (b < a) == rising;
      e[i] = change ? b : a;
      e[i | bit] = change ? a : b;
    }
#pragma unroll
  for (int i = 0; i < 1 << LEVELS; ++i) entries[slot(first + i * low)] = e[i];
}

// A block sorts ROWS times P entries (a power of two) in shared memory: Batcher's bitonic network, log2(P) (log2(P) + 1) / 2 steps, three of them with one barrier.
// load(row, place) -> entry; store(row, place, entry) for the first `keep` ones of each row.
template <class E, int P, int ROWS, int THREADS, class Load, class Store> TC_DEVICE void sort_tile(int keep, const Load& load, const Store& store) {
  TC_SHARED(E, entries);
  for (int i = threadIdx.x; i < ROWS * P; i += THREADS) entries[slot(i)] = load(i / P, i % P);
  for (int stage = 1; 1 << stage <= P; ++stage)
    for (int left = stage; left > 0;) {  // entries that the next step exchanges are 2^(left - 1) apart
      const int levels = left < 3 ? left : 3, low = left - levels;
      __syncthreads();
      for (int i = threadIdx.x; i < ROWS * P >> levels; i += THREADS) {
        const int first = (i >> low << left) + (i & ((1 << low) - 1));
        const bool rising = (first % P >> stage & 1) == 0;
        if (levels == 3) exchange<3>(entries, first, 1 << low, rising);
        if (levels == 2) exchange<2>(entries, first, 1 << low, rising);
        if (levels == 1) exchange<1>(entries, first, 1 << low, rising);
      }
      left = low;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * keep; i += THREADS) store(i / keep, i % keep, entries[slot(i / keep * P + i % keep)]);
}

// How many of `count` sorted entries are less than e, or (equal) not greater.
template <bool EQUAL, class E> TC_DEVICE int before(const E* entries, int count, const E& e) {
  int low = 0;
  while (count > 0) {
    const int half = count / 2;
    const bool less = EQUAL ? !(e < entries[low + half]) : entries[low + half] < e;
    low = less ? low + half + 1 : low;
    count = less ? count - half - 1 : half;
  }
  return low;
}

// Where entry `at` of a row comes in the merge of its run with its neighbour. The row holds sorted runs of `length` entries, `total` in all: the last run may be shorter, and alone.
// Fillers are alike: those of the left run come first.
template <class E> TC_DEVICE int merged(const E* row, int at, int length, int total) {
  const int run = at / length, first = (run ^ 1) * length, own = at % length;
  if (first >= total) return own;
  const int count = min<int>(length, total - first);
  return own + (run % 2 ? before<true>(row + first, count, row[at]) : before<false>(row + first, count, row[at]));
}

}  // namespace tc
