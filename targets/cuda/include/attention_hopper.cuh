// Attention for sm_90a: one warp group of a block brings queries, keys and values by TMA, the others keep 64 rows each of scores, probabilities and results in registers, all by wgmma.
// The pipeline is that of Shah et al., FlashAttention-3 (2024): scores of the next keys are on their way while a softmax runs, and warp groups take turns to ask for products.
#pragma once
#include "attention.cuh"
#include "hopper.cuh"

namespace tc {

// D, E: elements of a key and of a value, BT keys a step. Rows lie in shared memory in boxes of 64 elements, 128 bytes a row; keys and values take turns in the stages of one ring.
template <int D, int E, int BT_, int GROUPS_, int STAGES_> struct HopperHeads : WarpGroups<GROUPS_, 1> {
  static constexpr int BT = BT_, GROUPS = GROUPS_, BQ = 64 * GROUPS, STAGES = STAGES_;
  static constexpr int D16 = (D + 15) / 16 * 16, E16 = (E + 15) / 16 * 16, D_BOXES = (D + 63) / 64, E_BOXES = (E + 63) / 64;
  static_assert(GROUPS > 1, "warp groups that take turns");
  static constexpr int BOX = 128 * BT, Q_BOX = 128 * BQ, Q_BYTES = D_BOXES * Q_BOX, STAGE_BYTES = (D_BOXES > E_BOXES ? D_BOXES : E_BOXES) * BOX;
};

// Rows of heads of a tensor [batch][heads][rows], or with SWAPPED [batch][rows][heads].
template <bool SWAPPED> struct MappedHeads {
  const TensorMap& map;
  template <int BOXES, int BYTES> TC_DEVICE void bring(char* to, int row, int head, int batch, uint64_t* barrier) const {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) copy_head(to + box * BYTES, map, 32 * box, SWAPPED ? head : row, SWAPPED ? row : head, batch, barrier);
  }
};

// Blocks of BQ queries, each of a head, in the order in which they are taken: AT_ONCE heads side by side, whose keys and values stay in L2; with CAUSAL the last queries, which see most,
// first. Blocks of the grid take them in turns, there and back, so that all have about the same to do.
template <int BQ, int QUERIES, int HEADS, int BATCH, int AT_ONCE, bool CAUSAL> struct Blocks {
  static constexpr int TILES = (QUERIES + BQ - 1) / BQ, COUNT = TILES * HEADS * BATCH;
  int q0, head, batch;
  // Of this block's turn; false behind the last.
  TC_DEVICE bool at(int turn) {
    const int place = turn * (int)gridDim.x + (turn % 2 ? (int)gridDim.x - 1 - (int)blockIdx.x : (int)blockIdx.x);
    if (place >= COUNT) return false;
    const int inside = place % (AT_ONCE * TILES), tile = inside / AT_ONCE, each = place / (AT_ONCE * TILES) * AT_ONCE + inside % AT_ONCE;
    q0 = (CAUSAL ? TILES - 1 - tile : tile) * BQ;
    head = each % HEADS, batch = each / HEADS;
    return true;
  }
};

// Which tiles of keys a block takes, from the last of `count` to the first: at(step). tile: as that of attention.cuh's steps, for the 16 rows of a warp from `row` on.
template <class T, int KEYS, bool CAUSAL> struct EveryKey {
  static constexpr bool EVERY = true;
  template <class B> TC_DEVICE int count(const B& block) const { return ((CAUSAL ? tc::min(KEYS, block.q0 + T::BQ) : KEYS) + T::BT - 1) / T::BT; }
  template <class B> TC_DEVICE int at(const B&, int step) const { return step; }
  template <class B> TC_DEVICE int tile(const B&, int step, int row) const {
    const bool tail = KEYS % T::BT != 0 && step == KEYS / T::BT, diagonal = CAUSAL && (step + 1) * T::BT > row;
    return tail || diagonal ? 0 : -1;
  }
  template <class Score> static TC_DEVICE float score(const Score& score, int s, int t, float x, int) { return score(s, t, x); }
};
template <class T, int KEYS, int BEFORE, int AFTER> struct WindowKeys : ToldTile {
  using Keys = Window<T::BQ, T::BT, BEFORE, AFTER>;
  template <class B> TC_DEVICE int count(const B& block) const {
    const Keys keys(KEYS, block.q0);
    return keys.end - keys.begin;
  }
  template <class B> TC_DEVICE int at(const B& block, int step) const { return Keys(KEYS, block.q0).begin + step; }
  template <class B> TC_DEVICE int tile(const B& block, int step, int row) const { return Window<16, T::BT, BEFORE, AFTER>(KEYS, row).tile(at(block, step)); }
};

template <class Number> struct ListedKeys : ToldTile {  // number(block): of its list
  const int* lists;
  Number number;
  TC_DEVICE ListedKeys(const int* lists, const Number& number) : lists(lists), number(number) {}
  template <class B> TC_DEVICE int count(const B& block) const { return BlockList(lists, number(block)).end; }
  template <class B> TC_DEVICE int at(const B& block, int step) const { return BlockList(lists, number(block)).at(step); }
  template <class B> TC_DEVICE int tile(const B& block, int step, int) const { return BlockList(lists, number(block)).tile(step); }
};

// Attention of all blocks to out(batch, head), a row of E elements for every query, STRIDE elements apart. SHARE heads of q have the same keys and values. unit: of the scores,
// in powers of two. score(batch, head, s, t, x): the masked score of query s and key t whose product is x; PLAIN: it is x, but for what `keys` hide. SAFE: as in attention.cuh.
// All pieces of work of a block are one sequence of steps: the first scores of one are on their way while the last results of the one before are made and stored.
template <class P, class T, class B, int SHARE, int QUERIES, int KEYS, int E, int STRIDE, bool SAFE, bool PLAIN, class Q, class K, class V, class Out, class Seen, class Score>
TC_DEVICE void attention_hopper(const Q& q, const K& k, const V& v, float unit, const Out& out, const Seen& seen, const Score& score) {
  TC_SHARED(char, shared);
  using Heads = Ring<2, T::Q_BYTES>;
  using Keys = Ring<T::STAGES, T::STAGE_BYTES>;
  char* const first_head = shared + (-shared_address(shared) & 1023);
  char* const barriers = first_head + Heads::DATA + Keys::DATA;
  Heads heads(first_head, barriers);                                     // queries of this piece of work and of the next
  Keys ring(first_head + Heads::DATA, barriers + Heads::BARRIERS);  // keys and values
  const int group = shuffle((int)threadIdx.x / 128, 0), lane = threadIdx.x % 32, t = lane % 4;
  if (threadIdx.x == 0) {
    heads.open(4 * T::GROUPS);
    ring.open(4 * T::GROUPS);
    barriers_visible();
  }
  __syncthreads();
  B block;
  int turn = 0;
  block.at(turn);
  int step = seen.count(block) - 1;
  if (group == 0) {
    give_registers<T::COPYING>();
    if (threadIdx.x == 0) {
      const auto queries = [&] {
        q.template bring<T::D_BOXES, T::Q_BOX>(heads.fill(T::Q_BYTES), block.q0, block.head, block.batch, heads.full + heads.slot);
        heads.next();
      };
      const auto keys = [&](int step) {
        k.template bring<T::D_BOXES, T::BOX>(ring.fill(T::D_BOXES * T::BOX), seen.at(block, step) * T::BT, block.head / SHARE, block.batch, ring.full + ring.slot);
        ring.next();
      };
      const auto values = [&](const B& block, int step) {
        v.template bring<T::E_BOXES, T::BOX>(ring.fill(T::E_BOXES * T::BOX), seen.at(block, step) * T::BT, block.head / SHARE, block.batch, ring.full + ring.slot);
        ring.next();
      };
      queries();
      keys(step);
#pragma unroll 1
      while (true) {
        const B before = block;
        const int last = step;
        if (step-- == 0) {
          if (!block.at(++turn)) {
            values(before, last);
            break;
          }
          queries();
          step = seen.count(block) - 1;
        }
        keys(step);
        values(before, last);
      }
    }
  } else {
    take_registers<T::MULTIPLYING>();
    const int own = (group - 1) * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // this row of the queries, and the eighth from it on
    uint32_t rows = heads.read() + (group - 1) * 64 * 128;
    float s[T::BT / 2], o[T::E16 / 2] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f}, old[2];
    uint32_t p[T::BT / 16][4];
    const auto scores = [&](uint32_t keys) {  // s = q k^T
      const uint64_t queries = descriptor(rows), columns = descriptor(keys);
      products_begin();
#pragma unroll
      for (int d = 0; d < T::D16; d += 16)
        Wgmma<P, T::BT>::multiply(s, queries + ((d / 64 * T::Q_BOX + d % 64 * 2) >> 4), columns + ((d / 64 * T::BOX + d % 64 * 2) >> 4), d > 0);
      products_commit();
    };
    const auto results = [&](uint32_t values) {  // o += p v
      const uint64_t columns = descriptor(values, T::BOX);
      products_begin();
#pragma unroll
      for (int i = 0; i < T::BT / 16; ++i) WgmmaRows<P, T::E16>::multiply(o, p[i], columns + (i * 16 * 128 >> 4));
      products_commit();
    };
    const auto softmax = [&] {  // s = 2^(s - top); old: what sums with the former top are multiplied by
      const int query = block.q0 + own;
      const int hidden = seen.tile(block, step, query - lane / 4), place = seen.at(block, step);
      const auto masked = [&](int tile) {
        const auto told = [&](int s, int t, float x, auto... more) { return score(block.batch, block.head, s, t, x, more...); };
#pragma unroll
        for (int i = 0; i < T::BT / 2; ++i) {
          const int row = query + i / 2 % 2 * 8, key = place * T::BT + i / 4 * 8 + 2 * t + i % 2;
          if (PLAIN) {  // nothing is read that may not be there: without branches, scores stay in their registers
            const float x = seen.score(told, row, key, s[i], tile);
            s[i] = KEYS % T::BT == 0 || key < KEYS ? x : -INFINITY;
          } else {
            s[i] = row < QUERIES && key < KEYS ? seen.score(told, row, key, s[i], tile) : -INFINITY;
          }
        }
      };
      if (hidden >= 0 || (Seen::EVERY && !PLAIN)) masked(hidden);
      else if (!PLAIN) masked(-1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = top[r], sum = 0.0f;
#pragma unroll
        for (int j = 0; j < T::BT / 8; ++j) high = fmaxf(high, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        high = row_max(high, [](float a, float b) { return fmaxf(a, b); });
        const float base = high == -INFINITY ? 0.0f : high, less = -base * unit;
        old[r] = power_of_two((top[r] - base) * unit);
        top[r] = high;
#pragma unroll
        for (int j = 0; j < T::BT / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[4 * j + 2 * r + e];
            x = power_of_two(PLAIN ? fmaf(x, unit, less) : (x - base) * unit);  // what a mask hides may be as large as numbers are
            sum += x;
          }
        total[r] = total[r] * old[r] + sum;
      }
    };
    const auto probabilities = [&] {  // p = s: columns of scores are k of the next product
#pragma unroll
      for (int i = 0; i < T::BT / 4; ++i) p[i / 4][i % 4] = Values<P>::Policy::pack({s[2 * i], s[2 * i + 1]});
    };
    const auto store = [&](const B& block, const float(&total)[2]) {
      const auto to = out(block.batch, block.head);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = block.q0 + own + r * 8;
        const float scale = normalizer<SAFE>(row_sum(total[r]));
        if (row >= QUERIES) continue;
#pragma unroll
        for (int j = 0; j < T::E16 / 8; ++j) put<E>(to, (size_t)row * STRIDE, j * 8 + 2 * t, [&](int e) { return o[4 * j + 2 * r + e] * scale; });
      }
    };
    const auto read_all = [&] {  // of these queries
      if (step > 0) return;
      heads.release(heads.slot);
      heads.next();
    };
    scores(ring.read());
    products_wait<0>();
    products_end(s);
    ring.release(ring.slot);
    ring.next();
    read_all();
    softmax();
    probabilities();
    uint32_t next = ring.read();
    bool first = true;
#pragma unroll 1
    while (true) {
      const B before = block;
      const bool last = step-- == 0;
      if (last) {
        if (!block.at(++turn)) break;
        rows = heads.read() + (group - 1) * 64 * 128;
        step = seen.count(block) - 1;
      }
      const int keys = ring.slot;
      ring.next();
      if (group > 1 || !first) turn_wait(group);
      first = false;
      scores(next);
      const uint32_t now = ring.read();
      const int values = ring.slot;
      ring.next();
      results(now);
      turn_give(group % T::GROUPS + 1);
      products_wait<1>();
      products_end(s);
      ring.release(keys);
      read_all();
      const float sums[2] = {total[0], total[1]};
      if (last) top[0] = top[1] = -INFINITY, total[0] = total[1] = 0.0f;
      softmax();
      next = ring.read(total[0] < 0.0f || total[1] < 0.0f);  // exponentials before the wait for the results
      products_wait<0>();
      products_end(o);
      ring.release(values);
      if (last) store(before, sums);
#pragma unroll
      for (int i = 0; i < T::E16 / 2; ++i) o[i] = last ? 0.0f : o[i] * old[i / 2 % 2];
      probabilities();
    }
    results(next);
    products_wait<0>();
    products_end(o);
    store(block, total);
    if (group == 1 && !first) turn_wait(group);  // the turn that the last group gave
  }
}

}  // namespace tc
