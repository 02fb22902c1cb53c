// The part of attention over a paged cache that all instruction sets share: every row of a
// step, whatever its request, in one call. For one head dim (HEAD_DIM, a multiple of 32). Include
// tiles.h or vector.h before it: they say what an element is.
//
// Keys are taken in splits of SPLIT, splits in tiles of TILE, at fixed positions of the shard, and
// partial results are folded from first to last. The bits of a row therefore depend on its query
// and keys alone: not on the chunk it came in, the other rows, or the number of threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#ifndef TILE_KEYS
#define TILE_KEYS 256
#endif

namespace mnemosyne {

constexpr int D = HEAD_DIM;
constexpr int TILE = TILE_KEYS;  // keys whose packed K and V stay in the L2 cache
constexpr int64_t SPLIT = 8192;  // keys per partial result
constexpr int FEW = 32;          // folded rows up to which splits are computed in parallel
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;
static_assert(D % 32 == 0, "a key is read in whole vectors");

struct Segment {  // one row of the segment table
  int64_t first_row, num_rows, first_position, num_keys, first_key, first_page;
};

struct Call {  // as Python lays it out
  const element* q;  // [T, H, D]
  int64_t q_stride;
  const element *k, *v;    // [K, S, D]
  int64_t pool_stride;  // elements between two heads of the pool
  element* out;            // [T, H, D]
  float* lse;           // [T, H]
  int64_t num_heads, num_kv_heads;
  const Segment* segments;
  int64_t num_segments;
  const int64_t* pages;
  int64_t page_size;
  int64_t window;  // 0: none
  double scale;    // of scores
  int64_t num_threads;
};

struct Step {
  const element* q;  // [T, H, D]
  int64_t q_stride;
  const element* k;  // [K, S, D]
  const element* v;
  int64_t pool_stride;  // elements between two heads of the pool
  element* out;            // [T, H, D]
  float* lse;           // [T, H]
  int num_heads, num_kv_heads;
  const Segment* segments;
  const int64_t* pages;
  int64_t page_size;
  int64_t window;  // 0: none
  float scale;     // of scores in units of log2
};

struct Item {  // rows of one segment and KV head, over some splits of the keys
  int segment, head;
  int64_t first, count;        // folded rows
  int64_t split, stop_split;
  int64_t partial;             // index into the partial results, -1: the result is final
  double cost;
};

inline float exp2_scalar(float x) { return x == NONE ? 0.0f : std::exp2(x); }

// Rows of the next tile start on their way from memory while one is at work. Call it in the loop
// itself: a compiler drops calls of functions that do nothing but this.
inline void prefetch(const element* row) {
  for (int d = 0; d < D; d += 64 / (int)sizeof(element)) prefetch_line(row + d);
}

// Keys of the shard that a row may see: [low, high).
struct Sight {
  int64_t low, high;
};

// Slots of the keys from first on. Keys outside [low, high) are masked and stand for their
// nearest neighbour inside: keys that no row sees are never read.
inline void find_slots(const Step& step, const Segment& segment, int64_t first, Sight seen,
                       int64_t* slot) {
  const int64_t* pages = step.pages + segment.first_page;
  for (int j = 0; j < TILE;) {
    const int64_t key = std::clamp(first + j, seen.low, seen.high - 1);
    const int64_t offset = key % step.page_size;
    int64_t at = pages[key / step.page_size] * step.page_size + offset;
    if (key != first + j) {
      slot[j++] = at;
      continue;
    }
    const int64_t stop = std::min<int64_t>({TILE, j + step.page_size - offset, j + seen.high - key});
    while (j < stop) slot[j++] = at++;
  }
}

inline Sight sight_of(const Step& step, const Segment& segment, int64_t row) {
  const int64_t position = segment.first_position + row - segment.first_key;
  Sight sight{0, std::clamp<int64_t>(position + 1, 0, segment.num_keys)};
  if (step.window) sight.low = std::clamp<int64_t>(position + 1 - step.window, 0, sight.high);
  return sight;
}

struct Tile {
  int64_t first;  // key
  int num_keys;   // a multiple of 64; slots past the last key repeat it and are masked
  const element *k, *v;
  const int64_t *slot, *next;
};

// Add a later partial result to an earlier one.
inline void fold_partial(float* out, float& sum, float& top, const float* more, float more_sum,
                         float more_top) {
  const float now = std::max(top, more_top);
  if (now == NONE && more_sum == 0) return;  // no key was seen; where all scores are nan, it is nan
  const float a = exp2_scalar(top - now), b = exp2_scalar(more_top - now);
  for (int d = 0; d < D; d++) out[d] = out[d] * a + more[d] * b;
  sum = sum * a + more_sum * b;
  top = now;
}

inline void finish(const Step& step, int64_t row, int head, const float* out, float sum, float top) {
  element* to = step.out + (row * step.num_heads + head) * D;
  narrow_scaled<D>(out, sum == 0 ? 0.0f : 1.0f / sum, to);
  step.lse[row * step.num_heads + head] = sum == 0 ? NONE : top * LN2 + std::log(sum);
}

// Folding of tiles into rows, one object for each thread. A kernel gives a type of this form:
//
//   static constexpr int BLOCK;  // folded rows (token, head) that it takes at most
//   element q[BLOCK][D];            // of the rows, written by the caller before anything is called
//   void begin(const Sight* sight, int count);
//   void start();                // of a split
//   void fold(const Step& step, const Tile& tile);
//   void result(int m, float* out, float& sum, float& top);  // of a row, over the split

template <typename Folds>
struct alignas(64) Work {
  Folds folds;
  float out[Folds::BLOCK][D], sum[Folds::BLOCK], top[Folds::BLOCK];  // of splits before
  int64_t slot[2][TILE];  // of the tile at work and of the next one
};

// Partial results of one split: [count][D + 2], then sum and top of each.
template <typename Folds>
void run_item(const Step& step, const Item& item, Work<Folds>& work, float* partials) {
  const Segment& segment = step.segments[item.segment];
  const int group = step.num_heads / step.num_kv_heads;
  const int count = (int)item.count;
  const element* k = step.k + item.head * step.pool_stride;
  const element* v = step.v + item.head * step.pool_stride;
  Folds& folds = work.folds;
  Sight sight[Folds::BLOCK];
  for (int m = 0; m < count; m++) {
    const int64_t row = (item.first + m) / group;
    const int64_t head = item.head * group + (item.first + m) % group;
    sight[m] = sight_of(step, segment, row);
    std::memcpy(folds.q[m], step.q + (segment.first_row + row) * step.q_stride + head * D,
                sizeof folds.q[m]);
    std::fill_n(work.out[m], D, 0.0f);
    work.sum[m] = 0.0f;
    work.top[m] = NONE;
  }
  const Sight seen{sight[0].low, sight[count - 1].high};
  folds.begin(sight, count);
  int64_t found_tile = -1;
  for (int64_t split = item.split; split < item.stop_split; split++) {
    folds.start();
    const int64_t stop = std::min(seen.high, (split + 1) * SPLIT);
    for (int64_t first = split * SPLIT; first < stop; first += TILE) {
      if (first + TILE <= seen.low) continue;
      const int num_keys = (int)std::min<int64_t>(TILE, stop - first);
      const int64_t tile = first / TILE;
      const int64_t* slot = work.slot[tile % 2];
      if (found_tile != tile) find_slots(step, segment, first, seen, work.slot[tile % 2]);
      const int64_t* next = slot;
      if (first + TILE < seen.high) {
        find_slots(step, segment, first + TILE, seen, work.slot[(tile + 1) % 2]);
        next = work.slot[(tile + 1) % 2];
      }
      found_tile = tile + 1;
      folds.fold(step, Tile{first, (num_keys + 63) / 64 * 64, k, v, slot, next});
    }
    for (int m = 0; m < count; m++) {
      if (item.partial >= 0) {
        float* to = partials + (item.partial + m) * (D + 2);
        folds.result(m, to, to[D], to[D + 1]);
        continue;
      }
      float out[D], sum, top;
      folds.result(m, out, sum, top);
      fold_partial(work.out[m], work.sum[m], work.top[m], out, sum, top);
    }
  }
  if (item.partial >= 0) return;
  for (int m = 0; m < count; m++)
    finish(step, segment.first_row + (item.first + m) / group,
           item.head * group + (int)((item.first + m) % group), work.out[m], work.sum[m],
           work.top[m]);
}

struct Pending {  // rows whose splits were computed apart
  int segment, head;
  int64_t count, partial, num_splits;
};

inline void run_pending(const Step& step, const Pending& pending, const float* partials) {
  const Segment& segment = step.segments[pending.segment];
  const int group = step.num_heads / step.num_kv_heads;
  for (int64_t m = 0; m < pending.count; m++) {
    float out[D] = {}, sum = 0, top = NONE;
    for (int64_t i = 0; i < pending.num_splits; i++) {
      const float* from = partials + (pending.partial + i * pending.count + m) * (D + 2);
      fold_partial(out, sum, top, from, from[D], from[D + 1]);
    }
    finish(step, segment.first_row + m / group, pending.head * group + (int)(m % group), out, sum,
           top);
  }
}

template <typename Folds>
void attend(const Call* call) {
  const int64_t num_heads = call->num_heads, num_kv_heads = call->num_kv_heads;
  const Step step{call->q, call->q_stride, call->k, call->v, call->pool_stride, call->out, call->lse,
                  (int)num_heads, (int)num_kv_heads, call->segments, call->pages, call->page_size,
                  call->window, (float)call->scale * LOG2E};
  const int64_t group = num_heads / num_kv_heads;
  std::vector<Item> items;
  std::vector<Pending> pending;
  int64_t num_partials = 0;
  for (int i = 0; i < call->num_segments; i++) {
    const Segment& segment = step.segments[i];
    const int64_t num_folded = segment.num_rows * group;
    for (int head = 0; head < num_kv_heads; head++) {
      for (int64_t first = 0; first < num_folded; first += Folds::BLOCK) {
        const int64_t count = std::min<int64_t>(Folds::BLOCK, num_folded - first);
        const Sight begin = sight_of(step, segment, first / group);
        const Sight end = sight_of(step, segment, (first + count - 1) / group);
        const int64_t split = begin.low / SPLIT, stop = (end.high + SPLIT - 1) / SPLIT;
        if (num_folded > FEW) {
          const double cost = (double)(end.high - begin.low) * count;
          items.push_back({i, head, first, count, split, stop, -1, cost});
          continue;
        }
        pending.push_back({i, head, count, num_partials, stop - split});
        for (int64_t at = split; at < stop; at++) {
          const double cost = (double)(std::min(end.high, (at + 1) * SPLIT) - at * SPLIT) * count;
          items.push_back({i, head, first, count, at, at + 1, num_partials, cost});
          num_partials += count;
        }
      }
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
  std::unique_ptr<float[]> partials(new float[num_partials * (D + 2)]);
#pragma omp parallel num_threads((int)call->num_threads)
  {
    const std::unique_ptr<Work<Folds>> work(new Work<Folds>);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) run_item(step, items[i], *work, partials.get());
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < pending.size(); i++) run_pending(step, pending[i], partials.get());
  }
}

}  // namespace mnemosyne
