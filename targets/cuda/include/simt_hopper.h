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
struct Stack {  // batch x outer x inner rows; a box is of neighbours among the inner or the outer ones
  int64_t batch = 0, outer = 0, inner = 0;
  bool along_outer = false;
};
struct TensorMap {  // a matrix of words; box: rows of a copy, 32 words each. Of an image, a row is a pixel
  const char* data;
  uint64_t rows, columns;
  uint32_t box;
  Image image;
  Stack stack;
};

namespace simt {

[[noreturn]] inline void wrong(const char* what) {
  fprintf(stderr, "%s\n", what);
  abort();
}

struct Barrier { uint32_t phase : 1, count : 15, pending : 16; int32_t bytes; };
struct BoxCopy {  // plain: so many bytes as they lie, in place of a box
  char* to;
  TensorMap map;
  uint64_t* barrier;
  int column, row, w, h, n, dw, dh, inner, outer, batch;
  const char* from;
  int plain;
};
struct Product {  // rows: of A in registers, those of the lanes that share them; given: where this lane's were
  void* c;
  uint64_t a, b;
  void (*run)(uint32_t* c, const Product& product);
  const uint32_t* given;
  uint32_t rows[4][4];
};
struct Products {  // of a thread
  std::vector<std::vector<Product>> groups;     // the last one is open
  std::map<void*, std::vector<uint32_t>> sums;  // what products have in their hands, by its place
  bool begun = false;
};
inline thread_local std::vector<BoxCopy> copies;
inline thread_local std::map<int, Products> products;
inline thread_local uint32_t coin = 1;
struct Turn { int arrived; unsigned generation; bool came[1024]; };
inline thread_local Turn turns[16];
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
// byte `byte` of row `row` of 128 bytes, and of those that the other distance of the descriptor is apart
inline const char* byte_of(uint64_t descriptor, int row, int byte) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) wrong("a matrix descriptor of another layout");
  const uint32_t start = (descriptor & 0x3fff) << 4, apart = (descriptor >> 16 & 0x3fff) << 4, eight = (descriptor >> 32 & 0x3fff) << 4;
  return at(swizzled(start + byte / 128 * apart + row / 8 * eight + row % 8 * 128 + byte % 128));
}

}  // namespace simt

TC_DEVICE uint32_t shared_address(const void* p) { return simt::FIRST + (uint32_t)(static_cast<const char*>(p) - reinterpret_cast<const char*>(simt::machine.shared.data())); }

TC_DEVICE void barrier_init(uint64_t* barrier, int count) {
  if (!simt::copies.empty()) simt::wrong("a copy that nobody waited for");
  for (const simt::Turn& turn : simt::turns)
    if (turn.arrived) simt::wrong("a turn that nobody took");
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
// the first words of the rows of a box in their order, -1 for one outside
inline std::vector<int64_t> rows_of(const BoxCopy& copy) {
  const Image& image = copy.map.image;
  std::vector<int64_t> found;
  int w = copy.w, h = copy.h, n = copy.n;
  for (uint32_t r = 0; r < copy.map.box; ++r) {
    if (!image.n) {
      const Stack& stack = copy.map.stack;
      const int64_t inner = copy.inner + (stack.along_outer ? 0 : r), outer = copy.outer + (stack.along_outer ? r : 0);
      const int64_t row = stack.batch ? (copy.batch * stack.outer + outer) * stack.inner + inner : copy.row + r;
      const bool inside = stack.batch ? inner < stack.inner && outer < stack.outer && copy.batch < stack.batch : row >= 0 && row < (int64_t)copy.map.rows;
      found.push_back(inside ? row * (int64_t)copy.map.columns : -1);
      continue;
    }
    const int x = w + copy.dw, y = h + copy.dh;
    found.push_back(n < image.n && x >= 0 && x < image.w && y >= 0 && y < image.h ? ((n * image.h + y) * image.w + x) * (int64_t)copy.map.columns : -1);
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
  if (copy.plain) {
    if ((address | copy.plain | (uint32_t)(uintptr_t)copy.from) % 16) wrong("a copy of bytes that are not aligned");
    for (int i = 0; i < copy.plain; i += 4) memcpy(at(address + i), copy.from + i, 4);
    Barrier& barrier = barrier_at(copy.barrier);
    barrier.bytes -= copy.plain;
    return settle(barrier);
  }
  if (address % 1024) wrong("a box of a copy that is not aligned to its swizzle");
  const std::vector<int64_t> rows = rows_of(copy);
  for (uint32_t r = 0; r < copy.map.box; ++r)
    for (int c = 0; c < 32; ++c) {
      const int64_t column = copy.column + c;
      char* const to = at(swizzled(address + r * 128 + c * 4));
      rows[r] >= 0 && column >= 0 && column < (int64_t)copy.map.columns ? memcpy(to, copy.map.data + (rows[r] + column) * 4, 4) : memset(to, 0, 4);
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
TC_DEVICE void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  simt::request({static_cast<char*>(to), {}, barrier, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, static_cast<const char*>(from), bytes});
}
TC_DEVICE void copy_head(void* to, const TensorMap& map, int column, int inner, int outer, int batch, uint64_t* barrier) {
  simt::request({static_cast<char*>(to), map, barrier, column, 0, 0, 0, 0, 0, 0, inner, outer, batch});
}
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

TC_DEVICE bool turn_come(int number) {
  simt::Turn& turn = simt::turns[number];
  bool& came = turn.came[simt::machine.current];
  if (came) simt::wrong("a turn that is given twice");
  came = true;
  if (++turn.arrived < 256) return false;
  turn.arrived = 0;
  memset(turn.came, 0, sizeof turn.came);
  ++turn.generation;
  return true;
}
TC_DEVICE void turn_give(int number) { turn_come(number); }
TC_DEVICE void turn_wait(int number) {
  const unsigned generation = simt::turns[number].generation;
  if (turn_come(number)) return;
  for (int rounds = 0; simt::turns[number].generation == generation; ++rounds) {
    if (rounds > 100000) simt::wrong("a turn that nobody gives");
    simt::yield();
  }
}
TC_DEVICE float power_of_two(float x) { return exp2f(x); }

template <int COUNT> void give_registers() { static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "what setmaxnreg takes"); }
template <int COUNT> void take_registers() { give_registers<COUNT>(); }

TC_DEVICE void products_read(uint32_t (&)[4]) {}
TC_DEVICE void products_begin() { simt::mine().begun = true; }
TC_DEVICE void products_commit() { simt::mine().groups.emplace_back(); }
template <int PENDING> void products_wait() {
  simt::Products& mine = simt::mine();
  while ((int)mine.groups.size() - 1 > PENDING) {
    for (const simt::Product& product : mine.groups.front()) {
      if (product.given && memcmp(product.given, product.rows[simt::machine.current % 4], 16)) simt::wrong("registers that changed under a product");
      product.run(mine.sums[product.c].data(), product);
    }
    mine.groups.erase(mine.groups.begin());
  }
  for (auto each = mine.sums.begin(); each != mine.sums.end();) {
    const auto pending = [&](const std::vector<simt::Product>& group) { return std::any_of(group.begin(), group.end(), [&](const simt::Product& product) { return product.c == each->first; }); };
    if (std::any_of(mine.groups.begin(), mine.groups.end(), pending)) {
      ++each;
      continue;
    }
    memcpy(each->first, each->second.data(), each->second.size() * 4);
    each = mine.sums.erase(each);
    mine.begun = false;  // registers are the thread's again
  }
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
template <> struct Numbers<E4m3x4> {
  static constexpr int K = 16;
  static void a(const char* from, float (&to)[K]) { std::transform(from, from + K, to, [](char bits) { return widen_float8(bits); }); }
  static void b(const char* from, float (&to)[K]) { a(from, to); }
};
// sum += the products of both halves of 32 bytes
template <class P, class Sum, int K> void add_products(Sum& sum, const Sum (&a)[2][K], const Sum (&b)[2][K]) {
  if constexpr (std::is_same_v<P, E4m3x4>) {
    sum = sum_of_float8<2 * K>(sum, reinterpret_cast<const float(&)[2 * K]>(a), reinterpret_cast<const float(&)[2 * K]>(b));
  } else {
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < K; ++k) sum += a[half][k] * b[half][k];
  }
}

namespace simt {
template <class Sum, int COUNT> void ask(Sum (&c)[COUNT], Product product, bool add) {
  Products& mine = simt::mine();
  if (!mine.begun) wrong("a product that no fence precedes");
  auto& sums = mine.sums[c];
  if (sums.empty()) {
    sums.resize(COUNT);
    memcpy(sums.data(), c, sizeof c);
    memset(c, 0xff, sizeof c);
  }
  if (!add) std::fill(sums.begin(), sums.end(), 0);
  product.c = c;
  mine.groups.back().push_back(product);
}
}  // namespace simt

template <class P, int N> struct Wgmma {
  using Sum = typename P::Sum;
  static void multiply(Sum (&c)[N / 2], uint64_t a, uint64_t b, bool add = true) { simt::ask(c, {nullptr, a, b, &run, nullptr, {}}, add); }
  // the part of this thread
  static void run(uint32_t* c, const simt::Product& product) {
    constexpr int K = Numbers<P>::K;
    const int warp = simt::machine.current / 32 % 4, g = simt::machine.current % 32 / 4, t = simt::machine.current % 4;
    Sum a[2][2][K];
    for (int r = 0; r < 2; ++r)
      for (int half = 0; half < 2; ++half) Numbers<P>::a(simt::byte_of(product.a, 16 * warp + g + 8 * r, 16 * half), a[r][half]);
    for (int j = 0; j < N / 8; ++j)
      for (int e = 0; e < 2; ++e) {
        Sum sums[2];
        for (int r = 0; r < 2; ++r) memcpy(&sums[r], c + 4 * j + 2 * r + e, 4);
        Sum b[2][K];
        for (int half = 0; half < 2; ++half) Numbers<P>::b(simt::byte_of(product.b, 8 * j + 2 * t + e, 16 * half), b[half]);
        for (int r = 0; r < 2; ++r) add_products<P>(sums[r], a[r], b);
        for (int r = 0; r < 2; ++r) memcpy(c + 4 * j + 2 * r + e, &sums[r], 4);
      }
  }
};

template <class P, int N, bool ROWS_OF_K = true> struct WgmmaRows;
template <bool BF16, int N, bool ROWS_OF_K> struct WgmmaRows<Words<MmaHalf<BF16>>, N, ROWS_OF_K> {
  static void multiply(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add = true) {
    simt::Product product{nullptr, 0, b, &run, a, {}};
    memcpy(product.rows, simt::meet(a, 4, [](simt::Warp& w) {
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 16; ++i) w.out[lane][i] = w.in[lane / 4 * 4 + i / 4][i % 4];
    }), 64);
    simt::ask(c, product, add);
  }
  static void run(uint32_t* c, const simt::Product& product) {
    const int t = simt::machine.current % 4;
    float a[2][16];
    for (int lane = 0; lane < 4; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half) a[i % 2][i / 2 * 8 + 2 * lane + half] = widen_half<BF16>(product.rows[lane][i] >> 16 * half);
    for (int j = 0; j < N / 8; ++j)
      for (int e = 0; e < 2; ++e)
        for (int r = 0; r < 2; ++r) {
          float sum;
          memcpy(&sum, c + 4 * j + 2 * r + e, 4);
          for (int k = 0; k < 16; ++k) {
            uint16_t b;
            const int column = 8 * j + 2 * t + e;
            memcpy(&b, ROWS_OF_K ? simt::byte_of(product.b, k, 2 * column) : simt::byte_of(product.b, column, 2 * k), 2);
            sum += a[r][k] * widen_half<BF16>(b);
          }
          memcpy(c + 4 * j + 2 * r + e, &sum, 4);
        }
  }
};

}  // namespace tc
