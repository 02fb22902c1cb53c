// y = x W^T + b in bfloat16 for processors with AMX, for any number of rows of x.
//
// Weights are used where they lie, 16 outputs to a tile; rows of x are packed first, 16 side by
// side. Each output is the sum of the same products in the same order whatever the number of rows:
// the bits of a row of y depend on that row of x alone.

#include <omp.h>

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "linear_unit.h"

using namespace mnemosyne;

namespace {

constexpr int64_t CACHED = 1 << 19;  // elements of packed rows that stay in a core's cache
constexpr int64_t ROWS = 128;  // from which whole packed rows are kept there, not slices of them
constexpr int64_t GROUP = 8;   // tasks that share a slice of the rows

struct Task {  // up to WIDTH outputs
  Unit units[2];
  int num_units = 0;
  bf16* y;  // of the first row of all
  int64_t y_stride;
};

struct alignas(64) PackedTile {
  bf16 of[SIDE * STEP];
};

inline int64_t divide_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

// Memory of this thread.
template <typename T>
T* room(int64_t count) {
  static thread_local std::vector<T> memory;
  if ((int64_t)memory.size() < count) memory.resize(count);
  return memory.data();
}

template <bool IS_GATED>
class Product {
 public:
  explicit Product(const Call& call) : call(call) {
    for (int64_t i = 0; i < (IS_GATED ? 1 : call.num_parts); i++)
      num_tasks += divide_up(call.parts[i].num_outputs, WIDTH);
    const int64_t fitting = CACHED / call.num_columns / WIDTH * WIDTH;
    block_rows = fitting < ROWS ? 2 * ROWS : fitting;
  }

  void run() const {
    const int64_t num_blocks = divide_up(call.num_rows, block_rows);
    const std::unique_ptr<std::atomic<int64_t>[]> taken(new std::atomic<int64_t>[num_blocks]());
    PackedTile* shared = num_blocks == 1 ? room<PackedTile>(num_tiles(call.num_rows)) : nullptr;
#pragma omp parallel num_threads((int)call.num_threads)
    {
      Tiles tiles;
      if (shared) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_tiles(call.num_rows); i++) pack(0, i, shared);
      }
      // Each thread begins with blocks of its own and then helps with those of others.
      const int64_t first = num_blocks * omp_get_thread_num() / omp_get_num_threads();
      for (int64_t i = 0; i < num_blocks; i++) {
        const int64_t block = (first + i) % num_blocks;
        const int64_t row = block * block_rows;
        const Rows rows{shared, row, std::min(block_rows, call.num_rows - row)};
        multiply_rows(rows, taken[block], tiles);
      }
    }
  }

 private:
  struct Rows {
    const PackedTile* x;  // null: not yet packed
    int64_t first, count;
  };

  int64_t num_tiles(int64_t num_rows) const {
    return divide_up(num_rows, SIDE) * (call.num_columns / STEP);
  }

  // The i-th tile of rows side by side; the next one has the next columns of the same rows.
  void pack(int64_t row, int64_t i, PackedTile* to) const {
    alignas(64) static const bf16 zeros[STEP] = {};
    const int64_t num_steps = call.num_columns / STEP;
    row += i / num_steps * SIDE;
    const bf16* x = call.x + row * call.x_stride + i % num_steps * STEP;
    const auto at = [&](int j) { return row + j < call.num_rows ? x + j * call.x_stride : zeros; };
    pack_words(at, to[i].of, STEP);
  }

  // Multiply rows by the outputs that no other thread has taken.
  void multiply_rows(Rows rows, std::atomic<int64_t>& taken, Tiles& tiles) const {
    const int64_t slice = std::max<int64_t>(WAKE, CACHED / rows.count / WAKE * WAKE);
    const int64_t most = num_tasks / (2 * call.num_threads);  // so that each thread finds some
    const int64_t group = slice < call.num_columns ? std::clamp<int64_t>(most, 1, GROUP) : 1;
    int64_t index = taken.fetch_add(group);
    if (index >= num_tasks) return;
    if (!rows.x) {
      PackedTile* packed = room<PackedTile>(num_tiles(rows.count));
      for (int64_t i = 0; i < num_tiles(rows.count); i++) pack(rows.first, i, packed);
      rows.x = packed;
    }
    Task tasks[GROUP + 1];  // and the one that follows
    while (index < num_tasks) {
      const int64_t following = taken.fetch_add(group), count = std::min(group, num_tasks - index);
      for (int64_t t = 0; t < count; t++) tasks[t] = task_of(index + t);
      tasks[count] = task_of(std::min(following, num_tasks - 1));
      multiply_tasks(tasks, count, slice, rows, tiles);
      index = following;
    }
  }

  // A slice of the columns at a time: that part of the packed rows stays in the cache meanwhile.
  void multiply_tasks(const Task* tasks, int64_t count, int64_t slice, const Rows& rows,
                      Tiles& tiles) const {
    const bool is_whole = slice >= call.num_columns;
    const int64_t num_sums = 2 * divide_up(rows.count, WIDTH);
    Sums* sums = room<Sums>(is_whole ? num_sums : GROUP * num_sums);
    const auto slice_from = [&](int64_t k) {
      return Slice{k, std::min(k + slice, call.num_columns)};
    };
    for (Slice now = slice_from(0);; now = slice_from(now.end)) {
      const bool is_last = now.end == call.num_columns;
      for (int64_t t = 0; t < count; t++) {
        // the next task, or else the next slice of the first one
        const bool turns = t == count - 1 && !is_last;
        const Task& next = tasks[turns ? 0 : t + 1];
        const Slice then = turns ? slice_from(now.end) : t < count - 1 ? now : slice_from(0);
        multiply_task(tasks[t], now, ahead_of(next, then, rows), rows, sums + t * num_sums, tiles);
      }
      if (is_last) return;
    }
  }

  // Half of the next weights: the processor itself fetches what follows lines that were asked for.
  std::array<Ahead, 2> ahead_of(const Task& next, Slice then, const Rows& rows) const {
    const int lines = (int)divide_up(SIDE, divide_up(rows.count, WIDTH));
    const int64_t length = then.end - then.begin, skipped = call.num_columns - length;
    const auto of = [&](const bf16* w) { return Ahead{w + then.begin, length, skipped, lines}; };
    return {of(next.units[0].w[0]), of(next.units[0].w[1])};
  }

  void multiply_task(const Task& task, Slice slice, std::array<Ahead, 2> ahead, const Rows& rows,
                     Sums* sums, Tiles& tiles) const {
    const bool is_first = slice.begin == 0, is_last = slice.end == call.num_columns;
    for (int64_t first = 0; first < rows.count; first += WIDTH)
      for (int u = 0; u < task.num_units; u++) {
        const Unit& unit = task.units[u];
        const int64_t count = std::min<int64_t>(WIDTH, rows.count - first);
        bf16* y = task.y + (rows.first + first) * task.y_stride;
        ahead[u].y = y, ahead[u].y_stride = task.y_stride;
        ahead[u].num_rows = is_last && u == 0 ? count : 0;
        const auto multiply = count > SIDE ? multiply_unit<2> : multiply_unit<1>;
        tiles.fit(unit);
        multiply(unit, rows.x[0].of + first * call.num_columns, call.num_columns, slice, ahead[u],
                 *sums);
        if (is_last)
          (IS_GATED ? store_gated : store)(unit, *sums, y + SIDE * u, task.y_stride, count);
        if (!is_first || !is_last) sums++;  // a single slice keeps nothing
      }
  }

  Task task_of(int64_t index) const {
    const Part* part = call.parts;
    bf16* y = call.y;
    int64_t first = index * WIDTH;
    for (; first >= part->num_outputs; part++) {
      first -= divide_up(part->num_outputs, WIDTH) * WIDTH;
      y += call.num_rows * part->num_outputs;
    }
    Task task;
    task.y = y + first;
    task.y_stride = part->num_outputs;
    const Part& second = IS_GATED ? call.parts[1] : *part;
    for (int64_t i = first; i < std::min(first + WIDTH, part->num_outputs); i += SIDE) {
      if (!IS_GATED && i > first) break;
      Unit& unit = task.units[task.num_units++];
      fill(unit, 0, *part, i);
      fill(unit, 1, second, IS_GATED ? i : i + SIDE);
    }
    return task;
  }

  // Have a half of a unit be the outputs of a layer from one on.
  void fill(Unit& unit, int half, const Part& part, int64_t output) const {
    const int64_t count = std::clamp<int64_t>(part.num_outputs - output, 0, SIDE);
    __m256i bias = _mm256_setzero_si256();
    if (part.bias)
      bias = _mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), part.bias + output);
    _mm512_store_si512(unit.bias[half], _mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16));
    // A half without outputs repeats one that is there.
    unit.w[half] = part.w + std::min(output, part.num_outputs - 1) * call.num_columns;
    unit.count[half] = count;
  }

  const Call& call;
  int64_t num_tasks = 0, block_rows;
};

}  // namespace

// Layers of one input; their outputs lie one after the other in y, each [num_rows, num_outputs].
extern "C" void linear(const Call* call) { Product<false>(*call).run(); }

// silu(x G^T) * (x U^T): parts are G and U.
extern "C" void gated(const Call* call) { Product<true>(*call).run(); }
