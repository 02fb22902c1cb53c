// y = x W^T + b in bfloat16 for processors with AMX, for any number of rows of x.
//
// Weights are used where they lie, 16 outputs to a tile; rows of x stand side by side, 16 to a tile,
// and are packed so first. Each output is the sum of the same products in the same order whatever
// the number of rows: the bits of a row of y depend on that row of x alone.

#include <omp.h>

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "amx.h"
#include "linear.h"

using namespace mnemosyne;

namespace {

constexpr int SIDE = 16;           // outputs or rows of a tile
constexpr int STEP = 32;           // columns of a tile
constexpr int WIDTH = 2 * SIDE;    // outputs of a task, and rows that it takes at a time
constexpr int WAKE = 8 * STEP;     // columns between tile stores that nobody reads
constexpr int64_t BLOCK = 1 << 20;  // bytes of packed rows that stay in a core's cache

struct Unit {  // sixteen outputs and sixteen more, or those of a gate and of what it lets through
  const bf16* w[2];
  int64_t count[2];  // of outputs that there are
  alignas(64) float bias[2][SIDE];
};

struct Task {  // up to WIDTH outputs
  Unit units[2];
  int num_units = 0;
  bf16* y;  // of the first row of all
  int64_t y_stride;
};

struct alignas(64) Sums {
  float of[2][2][SIDE][SIDE];  // by half of the unit, rows by 16, output, row
};

struct Ahead {  // what is needed next, of which each step asks for some
  const bf16* w;
  int lines;  // of w for a step
  bf16* y;    // where the sums go, a row for a step
  int64_t y_stride, num_rows;
};

inline int64_t divide_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

// The sums of a unit for R times 16 packed rows.
template <int R>
inline void multiply(const Unit& unit, const bf16* x, int64_t num_columns, Ahead& ahead,
                     Sums& sums) {
  const int64_t stride = num_columns * sizeof(bf16);
  alignas(64) float unread[SIDE];
  for_each<2 * R>([](auto i) { tile_zero<i / R * 2 + i % R>(); });
  for (int64_t k = 0; k < num_columns; k += STEP) {
    for (int i = 0; i < ahead.lines; i++, ahead.w += STEP)
      _mm_prefetch((const char*)ahead.w, _MM_HINT_T1);
    if (ahead.num_rows-- > 0) {
      asm volatile("prefetchw %0" ::"m"(*ahead.y));
      ahead.y += ahead.y_stride;
    }
    for_each<R>([&](auto r) { tile_load<6 + r>(x + SIDE * (r * num_columns + k), 64); });
    for_each<2>([&](auto half) {
      constexpr int H = half;
      tile_load<4 + H>(unit.w[H] + k, stride);
      for_each<R>([](auto r) { tile_multiply<2 * H + r, 4 + H, 6 + r>(); });
    });
    // The first tile store after 600 ns without one takes 300.
    if (k % WAKE == 0) tile_store<4>(unread, 0);
  }
  for_each<2 * R>([&](auto i) { tile_store<i / R * 2 + i % R>(sums.of[i / R][i % R], 64); });
}

inline __m512 sum_of(const Unit& unit, const Sums& sums, int half, int rows, int output) {
  return _mm512_add_ps(_mm512_load_ps(sums.of[half][rows][output]),
                       _mm512_set1_ps(unit.bias[half][output]));
}

// Two neighbouring outputs of 16 rows, rounded, side by side.
inline __m512i pair(__m512 even, __m512 odd) {
  return _mm512_permutexvar_epi16(_mm512_load_si512(PAIRED),
                                  (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

void store(const Unit& unit, const Sums& sums, bf16* y, int64_t y_stride, int64_t num_rows) {
  const __mmask32 mask = (__mmask32)((1ull << (unit.count[0] + unit.count[1])) - 1);
  for (int r = 0; SIDE * r < num_rows; r++) {
    const auto value = [&](int i) { return sum_of(unit, sums, i / SIDE, r, i % SIDE); };
    __m512i pairs[SIDE];
#pragma GCC unroll 16
    for (int i = 0; i < SIDE; i++) pairs[i] = pair(value(2 * i), value(2 * i + 1));
    transpose(pairs);
    for (int i = 0; i < std::min<int64_t>(SIDE, num_rows - SIDE * r); i++)
      _mm512_mask_storeu_epi16(y + (SIDE * r + i) * y_stride, mask, pairs[i]);
  }
}

// silu of the first half times the second.
void store_gated(const Unit& unit, const Sums& sums, bf16* y, int64_t y_stride, int64_t num_rows) {
  const __mmask16 mask = (__mmask16)((1u << unit.count[0]) - 1);
  __m512i pairs[SIDE] = {};
  for (int r = 0; SIDE * r < num_rows; r++) {
    const auto value = [&](int i) {
      return _mm512_mul_ps(silu(sum_of(unit, sums, 0, r, i)), sum_of(unit, sums, 1, r, i));
    };
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) pairs[8 * r + i] = pair(value(2 * i), value(2 * i + 1));
  }
  transpose(pairs);
  for (int i = 0; i < num_rows; i++) {
    const __m512i rows = pairs[i % SIDE];
    _mm256_mask_storeu_epi16(
        y + i * y_stride, mask,
        i < SIDE ? _mm512_castsi512_si256(rows) : _mm512_extracti64x4_epi64(rows, 1));
  }
}

// The tiles as a thread has them: of as many rows as a unit has outputs, because what follows these
// in memory may be anybody's.
class Tiles {
 public:
  ~Tiles() { release_tiles(); }

  void fit(const Unit& unit) {
    TileConfig config;
    for (int i = 0; i < 6; i++) {
      const int half = i < 4 ? i / 2 : i - 4;
      config.rows[i] = (uint8_t)std::max<int64_t>(1, unit.count[half]);
    }
    if (!std::memcmp(&config, &now, sizeof config)) return;
    configure_tiles(config);
    now = config;
  }

 private:
  TileConfig now = {0};
};

// Memory of this thread, at least so many tiles.
bf16* room(int64_t num_tiles) {
  static thread_local std::vector<std::array<__m512i, SIDE>> memory;
  if ((int64_t)memory.size() < num_tiles) memory.resize(num_tiles);
  return (bf16*)memory.data();
}

template <bool IS_GATED>
class Product {
 public:
  explicit Product(const Call& call) : call(call) {
    for (int64_t i = 0; i < (IS_GATED ? 1 : call.num_parts); i++)
      num_tasks += divide_up(call.parts[i].num_outputs, WIDTH);
    const int64_t row_bytes = call.num_columns * sizeof(bf16);
    block_rows = std::max<int64_t>(2 * WIDTH, BLOCK / row_bytes / WIDTH * WIDTH);
  }

  void run() const {
    const int64_t num_blocks = divide_up(call.num_rows, block_rows);
    const std::unique_ptr<std::atomic<int64_t>[]> taken(new std::atomic<int64_t>[num_blocks]());
    bf16* shared = num_blocks == 1 ? room(num_tiles(call.num_rows)) : nullptr;
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
        multiply_block(block * block_rows, shared, taken[block], tiles);
      }
    }
  }

 private:
  int64_t num_tiles(int64_t num_rows) const {
    return divide_up(num_rows, SIDE) * (call.num_columns / STEP);
  }

  // The i-th tile of rows side by side; the next one has the next columns of the same rows.
  void pack(int64_t row, int64_t i, bf16* to) const {
    alignas(64) static const bf16 zeros[STEP] = {};
    const int64_t num_steps = call.num_columns / STEP;
    row += i / num_steps * SIDE;
    const bf16* x = call.x + row * call.x_stride + i % num_steps * STEP;
    const auto at = [&](int j) { return row + j < call.num_rows ? x + j * call.x_stride : zeros; };
    pack_words(at, to + i * SIDE * STEP, STEP);
  }

  // Multiply a block of rows by the outputs that no other thread has taken.
  void multiply_block(int64_t row, const bf16* x, std::atomic<int64_t>& taken, Tiles& tiles) const {
    int64_t index = taken++;
    if (index >= num_tasks) return;
    const int64_t num_rows = std::min(block_rows, call.num_rows - row);
    if (!x) {
      bf16* packed = room(num_tiles(num_rows));
      for (int64_t i = 0; i < num_tiles(num_rows); i++) pack(row, i, packed);
      x = packed;
    }
    for (Task task = task_of(index); index < num_tasks;) {
      index = taken++;
      const Task next = task_of(std::min(index, num_tasks - 1));
      multiply_task(task, next, x, row, num_rows, tiles);
      task = next;
    }
  }

  void multiply_task(const Task& task, const Task& next, const bf16* x, int64_t row,
                     int64_t num_rows, Tiles& tiles) const {
    Sums sums;
    // Half of the next weights: the processor itself fetches what follows lines that were asked for.
    const int lines = (int)divide_up(SIDE, divide_up(num_rows, WIDTH));
    Ahead ahead[2] = {{next.units[0].w[0], lines}, {next.units[0].w[1], lines}};
    for (int64_t first = 0; first < num_rows; first += WIDTH)
      for (int u = 0; u < task.num_units; u++) {
        const Unit& unit = task.units[u];
        const int64_t count = std::min<int64_t>(WIDTH, num_rows - first);
        bf16* y = task.y + (row + first) * task.y_stride;
        ahead[u].y = y, ahead[u].y_stride = task.y_stride, ahead[u].num_rows = u ? 0 : count;
        const auto multiply_rows = count > SIDE ? multiply<2> : multiply<1>;
        tiles.fit(unit);
        multiply_rows(unit, x + first * call.num_columns, call.num_columns, ahead[u], sums);
        (IS_GATED ? store_gated : store)(unit, sums, y + SIDE * u, task.y_stride, count);
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
