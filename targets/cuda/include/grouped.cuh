// Rows in groups that follow each other, each of an owner: which of them a block has. `owner` ascends, so row / BM + owner[row] does: it is the number of the block of the row, and two rows with
// the same number lie in the same BM rows from a multiple of BM on and have the same owner. No number is above (rows - 1) / BM + the last owner.
#pragma once

namespace tc {

struct Run { int owner, first, last; };  // rows first .. last - 1; none where a block has nothing to do

// The first row from `low` to `high` whose block is `number` or a later one; the 32 lanes of a warp try as many rows at a time.
template <int BM> TC_DEVICE int first_of(const int* owner, int number, int low, int high) {
  while (low < high) {
    const int step = (high - low + 31) / 32, lane = threadIdx.x % 32, row = min(low + step * (lane + 1), high) - 1;
    const int before = fold<32>(row / BM + owner[row] < number ? 1 : 0, [](int a, int b) { return a + b; });
    const int end = before < 32 ? min(low + step * (before + 1), high) - 1 : high;
    low = min(low + step * before, high);
    high = end;
  }
  return low;
}

// owners: their number, one more than that of the last.
template <int BM> TC_DEVICE Run run_of(const int* owner, int rows, int owners, int number) {
  const int first = first_of<BM>(owner, number, min(max(number - owners, 0) * BM, rows), min((number + 1) * BM, rows));
  const int last = first_of<BM>(owner, number + 1, first, min((first / BM + 1) * BM, rows));
  return {first < last ? owner[first] : 0, first, last};
}

}  // namespace tc
