// The machine below hopper.cuh on a CPU, on top of simt.h: barriers by their counts, TMA's boxes with their swizzle, wgmma by the layouts of the PTX manual.
//
// What is asynchronous happens as late as it may, or, TMA's copies in turns, at once: products read shared memory when they are waited for, and their sums are NaN until then.
// A barrier with too many arrivals, one that nobody completes, a product that no fence precedes: abort.
#pragma once
#include <map>

#include "simt.h"

#define TC_MAP const tc::TensorMap

namespace tc {

struct Image {  // n x h x w pixels; bases of windows lie between the corners, which count from the first and the last pixel, so many apart
  int64_t n = 0, h = 0, w = 0;
  int lower_w = 0, lower_h = 0, upper_w = 0, upper_h = 0, stride_w = 1, stride_h = 1;
};
struct TensorMap {  // a matrix of words; box: rows of a copy, 32 words each. Of an image, a row is a pixel
  const char* data;
  uint64_t rows, columns;
  uint32_t box;
  Image image;
};

namespace simt {

[[noreturn]] inline void wrong(const char* what) {
  fprintf(stderr, "%s\n", what);
  abort();
}

struct Barrier { uint32_t phase : 1, count : 15, pending : 16; int32_t bytes; };
struct BoxCopy { char* to; TensorMap map; uint64_t* barrier; int column, row, w, h, n, dw, dh; };
struct Product { void* c; uint64_t a, b; void (*run)(uint32_t* c, uint64_t a, uint64_t b); };
struct Products {  // of a thread
  std::vector<std::vector<Product>> groups;     // the last one is open
  std::map<void*, std::vector<uint32_t>> sums;  // what products have in their hands
  bool begun = false;
};
inline thread_local std::vector<BoxCopy> copies;
inline thread_local std::map<int, Products> products;
inline thread_local uint32_t coin = 1;
// addresses of shared memory begin at 16: nothing is aligned by itself
constexpr uint32_t FIRST = 16;

inline char* at(uint32_t address) {
  if (address < FIRST || address - FIRST >= machine.shared.size() * 4) wrong("an address outside of shared memory");
  return reinterpret_cast<char*>(machine.shared.data()) + address - FIRST;
}
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
inline void settle(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.count;
}
inline Barrier& barrier_at(uint64_t* p) { return *reinterpret_cast<Barrier*>(p); }
inline Products& mine() {
  Products& found = products[machine.current];
  if (found.groups.empty()) found.groups.emplace_back();
  return found;
}
// where the 8 words of row `row` lie, in halves of 16 bytes
inline const char* half_row(uint64_t descriptor, int row, int half) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) wrong("a matrix descriptor of another layout");
  const uint32_t start = (descriptor & 0x3fff) << 4, apart = (descriptor >> 32 & 0x3fff) << 4;
  return at(swizzled(start + row / 8 * apart + row % 8 * 128 + 16 * half));
}

}  // namespace simt

TC_DEVICE uint32_t shared_address(const void* p) { return simt::FIRST + (uint32_t)(static_cast<const char*>(p) - reinterpret_cast<const char*>(simt::machine.shared.data())); }

TC_DEVICE void barrier_init(uint64_t* barrier, int count) {
  if (!simt::copies.empty()) simt::wrong("a copy that nobody waited for");
  simt::barrier_at(barrier) = {0, (uint32_t)count, (uint32_t)count, 0};
}
TC_DEVICE void barriers_visible() {}
TC_DEVICE void barrier_arrive(uint64_t* p) {
  simt::Barrier& barrier = simt::barrier_at(p);
  if (!barrier.pending) simt::wrong("more arrivals than a barrier expects");
  --barrier.pending;
  simt::settle(barrier);
}
TC_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  simt::barrier_at(barrier).bytes += bytes;
  barrier_arrive(barrier);
}

namespace simt {
// the rows of a box in their order, -1 for one outside
inline std::vector<int64_t> rows_of(const BoxCopy& copy) {
  const Image& image = copy.map.image;
  std::vector<int64_t> found;
  int w = copy.w, h = copy.h, n = copy.n;
  for (uint32_t r = 0; r < copy.map.box; ++r) {
    if (!image.n) {
      const int64_t row = copy.row + (int64_t)r;
      found.push_back(row >= 0 && row < (int64_t)copy.map.rows ? row : -1);
      continue;
    }
    const int x = w + copy.dw, y = h + copy.dh;
    found.push_back(n < image.n && x >= 0 && x < image.w && y >= 0 && y < image.h ? (n * image.h + y) * image.w + x : -1);
    if ((w += image.stride_w) < image.w + image.upper_w) continue;
    w = image.lower_w;
    if ((h += image.stride_h) < image.h + image.upper_h) continue;
    h = image.lower_h;
    ++n;
  }
  return found;
}
inline void arrive(const BoxCopy& copy) {
  const uint32_t address = shared_address(copy.to);
  if (address % 1024) wrong("a box of a copy that is not aligned to its swizzle");
  const std::vector<int64_t> rows = rows_of(copy);
  for (uint32_t r = 0; r < copy.map.box; ++r)
    for (int c = 0; c < 32; ++c) {
      const int64_t column = copy.column + c;
      char* const to = at(swizzled(address + r * 128 + c * 4));
      rows[r] >= 0 && column >= 0 && column < (int64_t)copy.map.columns ? memcpy(to, copy.map.data + (rows[r] * copy.map.columns + column) * 4, 4) : memset(to, 0, 4);
    }
  Barrier& barrier = barrier_at(copy.barrier);
  barrier.bytes -= copy.map.box * 128;
  settle(barrier);
}
inline void request(const BoxCopy& copy) {
  coin = coin * 1664525u + 1013904223u;
  if (coin >> 31)
    arrive(copy);
  else
    copies.push_back(copy);
}
}  // namespace simt

TC_DEVICE void copy_tile(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) { simt::request({static_cast<char*>(to), map, barrier, column, row}); }
TC_DEVICE void copy_window(void* to, const TensorMap& map, int channel, int w, int h, int n, int dw, int dh, uint64_t* barrier) {
  simt::request({static_cast<char*>(to), map, barrier, channel, 0, w, h, n, dw, dh});
}
TC_DEVICE void barrier_wait(uint64_t* p, uint32_t parity) {
  for (int rounds = 0; simt::barrier_at(p).phase == parity; ++rounds) {
    auto& all = simt::copies;
    const auto found = std::find_if(all.begin(), all.end(), [p](const simt::BoxCopy& copy) { return copy.barrier == p; });
    if (found != all.end()) {
      const simt::BoxCopy copy = *found;
      all.erase(found);
      simt::arrive(copy);
    } else {
      if (rounds > 100000) simt::wrong("a barrier that nobody completes");
      simt::yield();
    }
  }
}

template <int COUNT> void give_registers() { static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes"); }
template <int COUNT> void take_registers() { give_registers<COUNT>(); }

TC_DEVICE void products_begin() { simt::mine().begun = true; }
TC_DEVICE void products_commit() { simt::mine().groups.emplace_back(); }
template <int PENDING> void products_wait() {
  simt::Products& mine = simt::mine();
  while ((int)mine.groups.size() - 1 > PENDING) {
    for (const simt::Product& product : mine.groups.front()) product.run(mine.sums[product.c].data(), product.a, product.b);
    mine.groups.erase(mine.groups.begin());
  }
  if (mine.groups.size() > 1 || !mine.groups[0].empty()) return;
  for (auto& [c, sums] : mine.sums) memcpy(c, sums.data(), sums.size() * 4);
  mine.sums.clear();
  mine.begun = false;
}
template <class Sum, int COUNT> void products_end(Sum (&)[COUNT]) {}

template <class P> struct Numbers;  // bytes of an operand as numbers
template <bool BF16> struct Numbers<Words<MmaHalf<BF16>>> {
  static constexpr int K = 8;
  static void a(const char* from, float (&to)[K]) {
    for (int k = 0; k < K; ++k) to[k] = widen_half<BF16>(reinterpret_cast<const uint16_t*>(from)[k]);
  }
  static void b(const char* from, float (&to)[K]) { a(from, to); }
};
template <> struct Numbers<U8S8> {
  static constexpr int K = 16;
  static void a(const char* from, int (&to)[K]) { std::copy_n(reinterpret_cast<const uint8_t*>(from), K, to); }
  static void b(const char* from, int (&to)[K]) { std::copy_n(reinterpret_cast<const int8_t*>(from), K, to); }
};

template <class P, int N> struct Wgmma {
  using Sum = typename P::Sum;
  static void multiply(Sum (&c)[N / 2], uint64_t a, uint64_t b) {
    simt::Products& mine = simt::mine();
    if (!mine.begun) simt::wrong("a product that no fence precedes");
    auto& sums = mine.sums[c];
    if (sums.empty()) {
      sums.resize(N / 2);
      memcpy(sums.data(), c, sizeof c);
      memset(c, 0xff, sizeof c);
    }
    mine.groups.back().push_back({c, a, b, &run});
  }
  // the part of this thread
  static void run(uint32_t* c, uint64_t da, uint64_t db) {
    constexpr int K = Numbers<P>::K;
    const int warp = simt::machine.current / 32 % 4, g = simt::machine.current % 32 / 4, t = simt::machine.current % 4;
    Sum a[2][2][K];
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half) Numbers<P>::a(simt::half_row(da, 16 * warp + g + 8 * r, half), a[r][half]);
    for (int j = 0; j < N / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        Sum sums[2];
        for (int r = 0; r < 2; ++r) memcpy(&sums[r], c + 4 * j + 2 * r + e, 4);
        for (int half = 0; half < 2; ++half) {
          Sum b[K];
          Numbers<P>::b(simt::half_row(db, 8 * j + 2 * t + e, half), b);
          for (int k = 0; k < K; ++k)
            for (int r = 0; r < 2; ++r) sums[r] += a[r][half][k] * b[k];
        }
        for (int r = 0; r < 2; ++r) memcpy(c + 4 * j + 2 * r + e, &sums[r], 4);
      }
  }
};

}  // namespace tc
