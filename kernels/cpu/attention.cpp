// Attention over a paged cache for AVX-512 BF16 processors: every row of a step, whatever its
// request, in one call. Compiled for one head dim (HEAD_DIM, a multiple of 32).
//
// Keys are taken in splits of SPLIT, splits in tiles of TILE, at fixed positions of the shard, and
// partial results are folded from first to last. The bits of a row therefore depend on its query
// and keys alone: not on the chunk it came in, the other rows, or the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "tiles.h"

using namespace mnemosyne;

namespace {

constexpr int D = HEAD_DIM;
constexpr int TILE = 256;       // keys whose packed K and V stay in the L2 cache
constexpr int64_t SPLIT = 8192;  // keys per partial result
constexpr int BLOCK = 192;      // folded rows (token, head) that share a packed tile
constexpr int NARROW = 18;       // folded rows up to which reading bounds the speed
constexpr int FEW = 32;         // folded rows up to which splits are computed in parallel
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.44269504088896340736f;
constexpr float LN2 = 0.693147180559945309417f;
static_assert(D % 32 == 0, "a key is read in whole vectors");

struct Segment {  // one row of the segment table
  int64_t first_row, num_rows, first_position, num_keys, first_key, first_page;
};

struct Call {  // as Python lays it out
  const bf16* q;  // [T, H, D]
  int64_t q_stride;
  const bf16 *k, *v;    // [K, S, D]
  int64_t pool_stride;  // elements between two heads of the pool
  bf16* out;            // [T, H, D]
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
  const bf16* q;  // [T, H, D]
  int64_t q_stride;
  const bf16* k;  // [K, S, D]
  const bf16* v;
  int64_t pool_stride;  // elements between two heads of the pool
  bf16* out;            // [T, H, D]
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

// What a block of rows carries from tile to tile.
struct alignas(64) Running {
  float out[BLOCK][D];
  float sum[BLOCK][16];
  float top[BLOCK];  // largest score, in units of log2
};

struct alignas(64) Scratch {
  bf16 q[BLOCK][D];
  bf16 k[TILE * D];  // [TILE / 64][D / 2][64][2]
  bf16 v[TILE * D];  // [TILE / 2][D][2]
  float score[NARROW][TILE];
  bf16 weight[NARROW][TILE];
  float alpha[NARROW];
  int64_t slot[2][TILE];  // of the tile at work and of the next one
  Running split, all;
};

inline float exp2_scalar(float x) { return x == NONE ? 0.0f : std::exp2(x); }

// Packing reads a tile; meanwhile the same keys of the next tile start on their way from memory.
inline void prefetch_line(const bf16* at) { _mm_prefetch((const char*)at, _MM_HINT_T1); }

inline void prefetch(const bf16* row) {
  for (int d = 0; d < D; d += 32) prefetch_line(row + d);
}

// Where the elements of two vectors go when these are interleaved: the lower half of the result.
alignas(64) const uint16_t INTERLEAVED[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                              37, 6, 38, 7, 39, 8,  40, 9,  41, 10, 42,
                                              11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

void pack_keys(const bf16* k, const int64_t* slot, const int64_t* next, bf16* packed, int num_keys) {
  for (int j = 0; j < num_keys; j += 16) {
    bf16* to = packed + (j / 64) * 64 * D + (j % 64) * 2;
    for (int i = 0; i < 16; i++) prefetch(k + next[j + i] * D);
    for (int d = 0; d < D; d += 32)
      pack_words([&](int i) { return k + slot[j + i] * D + d; }, to + d * 64, 128);
  }
}

void pack_values(const bf16* v, const int64_t* slot, const int64_t* next, bf16* packed,
                 int num_keys) {
  const __m512i low = _mm512_load_si512(INTERLEAVED);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int j = 0; j < num_keys; j += 2) {
    const bf16* a = v + slot[j] * D;
    const bf16* b = v + slot[j + 1] * D;
    bf16* to = packed + j * D;
    prefetch(v + next[j] * D);
    prefetch(v + next[j + 1] * D);
#pragma GCC unroll 8
    for (int d = 0; d < D; d += 32) {
      const __m512i x = _mm512_loadu_si512(a + d), y = _mm512_loadu_si512(b + d);
      _mm512_store_si512(to + 2 * d, _mm512_permutex2var_epi16(x, low, y));
      _mm512_store_si512(to + 2 * d + 32, _mm512_permutex2var_epi16(x, high, y));
    }
  }
}

// Keys of the shard that a row may see: [low, high).
struct Sight {
  int64_t low, high;
};

// Slots of the keys from first on. Keys outside [low, high) are masked and stand for their
// nearest neighbour inside: what no row sees is not even read.
void find_slots(const Step& step, const Segment& segment, int64_t first, Sight seen, int64_t* slot) {
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

inline __mmask16 mask_of(const Sight& sight, int64_t key) {
  const int64_t low = std::clamp<int64_t>(sight.low - key, 0, 16);
  const int64_t high = std::clamp<int64_t>(sight.high - key, 0, 16);
  return (__mmask16)(((1u << high) - 1) & ~((1u << low) - 1));
}

// Scores of R rows, from row m of a block on, against 64 packed keys.
template <int R>
inline void score_keys(Scratch& s, int m, int line, int j) {
  multiply<R, 4, false>(s.q[m], D, s.k + j * D, 128, &s.score[line][j], TILE, D / 2, nullptr);
}

// Scores of a tile become weights; the sums of R rows follow. alpha: what earlier sums shrink by.
template <int R>
inline void weigh_keys(const Step& step, Scratch& s, int m, int line, const Sight* sight,
                       int64_t first, int num_keys) {
  const __m512 scale = _mm512_set1_ps(step.scale);
  for (int r = 0; r < R; r++) {
    float* score = s.score[line + r];
    const bool is_whole = sight[m + r].low <= first && sight[m + r].high >= first + num_keys;
    __m512 top = _mm512_set1_ps(NONE);
    if (is_whole) {
      for (int j = 0; j < num_keys; j += 16) top = _mm512_max_ps(top, _mm512_load_ps(score + j));
    } else {
      for (int j = 0; j < num_keys; j += 16) {
        const __mmask16 mask = mask_of(sight[m + r], first + j);
        const __m512 x = _mm512_mask_mov_ps(_mm512_set1_ps(NONE), mask, _mm512_load_ps(score + j));
        top = _mm512_max_ps(top, x);
      }
    }
    const float old = s.split.top[m + r];
    const float now = std::max(old, _mm512_reduce_max_ps(top) * step.scale);
    const float alpha = old == now ? 1.0f : exp2_scalar(old - now);
    s.alpha[line + r] = alpha;
    s.split.top[m + r] = now;
    const __m512 shift = _mm512_set1_ps(now == NONE ? 0.0f : now);
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(s.split.sum[m + r]), _mm512_set1_ps(alpha));
    bf16* weight = s.weight[line + r];
    for (int j = 0; j < num_keys; j += 32) {
      __m512 x = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score + j), scale, shift));
      __m512 y = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score + j + 16), scale, shift));
      if (!is_whole) {
        x = _mm512_maskz_mov_ps(mask_of(sight[m + r], first + j), x);
        y = _mm512_maskz_mov_ps(mask_of(sight[m + r], first + j + 16), y);
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
      _mm512_store_si512(weight + j, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    }
    _mm512_store_ps(s.split.sum[m + r], sum);
  }
}

// Add the weighted values of keys [j, j + num_keys) of the tile to R rows.
template <int R>
inline void add_values(Scratch& s, int m, int line, int j, int num_keys, const float* alpha) {
  constexpr int NV = D % 64 ? 2 : 4;
  for (int d = 0; d < D; d += 16 * NV)
    multiply<R, NV, true>(&s.weight[line][j], TILE, s.v + j * D + 2 * d, 2 * D,
                          &s.split.out[m][d], D, num_keys / 2, alpha);
}

struct Tile {
  int64_t first;  // key
  int num_keys;   // a multiple of 64; what is past the last key repeats it, and is masked
  const bf16 *k, *v;
  const int64_t *slot, *next;
};

// Many rows: pack the tile once, then take the rows by groups.
void fold_wide(const Step& step, Scratch& s, const Tile& tile, const Sight* sight, int count) {
  pack_keys(tile.k, tile.slot, tile.next, s.k, tile.num_keys);
  pack_values(tile.v, tile.slot, tile.next, s.v, tile.num_keys);
  for (int m = 0; m < count; m += GROUP) {
    const int rows = std::min(GROUP, count - m);
    if (sight[m + rows - 1].high <= tile.first || sight[m].low >= tile.first + TILE) continue;
    for_rows(rows, [&](auto R) {
      for (int j = 0; j < tile.num_keys; j += 64) score_keys<R>(s, m, 0, j);
      weigh_keys<R>(step, s, m, 0, sight, tile.first, tile.num_keys);
      add_values<R>(s, m, 0, 0, tile.num_keys, s.alpha);
    });
  }
}

// The scores of R rows against 16 keys, straight from where the keys lie.
template <int R>
inline void score_from_pool(Scratch& s, const Tile& tile, int m, int j) {
  __m512 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) acc[r] = _mm512_setzero_ps();
  for (int d = 0; d < D; d += 32) {
    __m512i column[16];
    load_words([&](int i) { return tile.k + tile.slot[j + i] * D + d; }, column);
#pragma GCC unroll 16
    for (int p = 0; p < 16; p++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        acc[r] = _mm512_dpbf16_ps(acc[r], pair_of(s.q[m + r] + d + 2 * p), (__m512bh)column[p]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) _mm512_store_ps(&s.score[m + r][j], acc[r]);
}

// Add the weighted values of a tile to R rows, straight from where the values lie.
template <int R>
inline void add_from_pool(Scratch& s, const Tile& tile, int m) {
  const __m512i low = _mm512_load_si512(INTERLEAVED);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int d = 0; d < D; d += 32) {
    __m512 acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512 alpha = _mm512_set1_ps(s.alpha[m + r]);
      acc[r][0] = _mm512_mul_ps(_mm512_load_ps(&s.split.out[m + r][d]), alpha);
      acc[r][1] = _mm512_mul_ps(_mm512_load_ps(&s.split.out[m + r][d + 16]), alpha);
    }
    for (int j = 0; j < tile.num_keys; j += 2) {
      const __m512i a = _mm512_loadu_si512(tile.v + tile.slot[j] * D + d);
      const __m512i b = _mm512_loadu_si512(tile.v + tile.slot[j + 1] * D + d);
      prefetch_line(tile.v + tile.next[j] * D + d);
      prefetch_line(tile.v + tile.next[j + 1] * D + d);
      const __m512bh x = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
      const __m512bh y = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512bh weight = pair_of(&s.weight[m + r][j]);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], weight, x);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], weight, y);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      _mm512_store_ps(&s.split.out[m + r][d], acc[r][0]);
      _mm512_store_ps(&s.split.out[m + r][d + 16], acc[r][1]);
    }
  }
}

// A decode of one request: no tile is packed, each key and value is read once.
void fold_few(const Step& step, Scratch& s, const Tile& tile, const Sight* sight, int count) {
  for_rows(count, [&](auto R) {
    for (int j = 0; j < tile.num_keys; j += 16) {
      for (int i = 0; i < 16; i++) prefetch(tile.k + tile.next[j + i] * D);
      score_from_pool<R>(s, tile, 0, j);
    }
    weigh_keys<R>(step, s, 0, 0, sight, tile.first, tile.num_keys);
    add_from_pool<R>(s, tile, 0);
  });
}

// Few rows, for which memory is the limit: compute between the reads, so that it never rests.
void fold_narrow(const Step& step, Scratch& s, const Tile& tile, const Sight* sight, int count) {
  static const float ONES[GROUP] = {1, 1, 1, 1, 1, 1};
  const auto each = [&](auto body) {
    for (int m = 0; m < count; m += GROUP)
      for_rows(std::min(GROUP, count - m), [&](auto R) { body(R, m); });
  };
  for (int j = 0; j < tile.num_keys; j += 64) {
    pack_keys(tile.k, tile.slot + j, tile.next + j, s.k + j * D, 64);
    each([&](auto R, int m) { score_keys<R>(s, m, m, j); });
  }
  each([&](auto R, int m) { weigh_keys<R>(step, s, m, m, sight, tile.first, tile.num_keys); });
  for (int j = 0; j < tile.num_keys; j += 64) {
    pack_values(tile.v, tile.slot + j, tile.next + j, s.v + j * D, 64);
    each([&](auto R, int m) { add_values<R>(s, m, m, j, 64, j ? ONES : s.alpha + m); });
  }
}

void start(Running& running, int64_t count) {
  std::memset(running.out, 0, count * sizeof running.out[0]);
  std::memset(running.sum, 0, count * sizeof running.sum[0]);
  std::fill_n(running.top, count, NONE);
}

// Add a later partial result to an earlier one; sums are scalars in lane 0 here.
inline void fold_partial(float* out, float& sum, float& top, const float* more, float more_sum,
                         float more_top) {
  const float now = std::max(top, more_top);
  if (now == NONE) return;
  const float a = exp2_scalar(top - now), b = exp2_scalar(more_top - now);
  for (int d = 0; d < D; d++) out[d] = out[d] * a + more[d] * b;
  sum = sum * a + more_sum * b;
  top = now;
}

inline void finish(const Step& step, int64_t row, int head, const float* out, float sum, float top) {
  bf16* to = step.out + (row * step.num_heads + head) * D;
  const __m512 scale = _mm512_set1_ps(sum > 0 ? 1.0f / sum : 0.0f);
  for (int d = 0; d < D; d += 32) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(out + d), scale);
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(out + d + 16), scale);
    _mm512_storeu_si512(to + d, (__m512i)_mm512_cvtne2ps_pbh(y, x));
  }
  step.lse[row * step.num_heads + head] = sum > 0 ? top * LN2 + std::log(sum) : NONE;
}

// Partial results of one split: [count][D + 2], then sum and top of each.
void run_item(const Step& step, const Item& item, Scratch& s, float* partials) {
  const Segment& segment = step.segments[item.segment];
  const int group = step.num_heads / step.num_kv_heads;
  const bf16* k = step.k + item.head * step.pool_stride;
  const bf16* v = step.v + item.head * step.pool_stride;
  Sight sight[BLOCK];
  for (int64_t m = 0; m < item.count; m++) {
    const int64_t row = (item.first + m) / group;
    const int64_t head = item.head * group + (item.first + m) % group;
    sight[m] = sight_of(step, segment, row);
    std::memcpy(s.q[m], step.q + (segment.first_row + row) * step.q_stride + head * D, sizeof s.q[m]);
  }
  const Sight seen{sight[0].low, sight[item.count - 1].high};
  start(s.all, item.count);
  int64_t packed_tile = -1;
  for (int64_t split = item.split; split < item.stop_split; split++) {
    start(s.split, item.count);
    const int64_t stop = std::min(seen.high, (split + 1) * SPLIT);
    for (int64_t first = split * SPLIT; first < stop; first += TILE) {
      if (first + TILE <= seen.low) continue;
      const int num_keys = (int)std::min<int64_t>(TILE, stop - first);
      const int num_packed = (num_keys + 63) / 64 * 64;
      const int64_t tile = first / TILE;
      const int64_t* slot = s.slot[tile % 2];
      if (packed_tile != tile) find_slots(step, segment, first, seen, s.slot[tile % 2]);
      const int64_t* next = slot;
      if (first + TILE < seen.high) {
        find_slots(step, segment, first + TILE, seen, s.slot[(tile + 1) % 2]);
        next = s.slot[(tile + 1) % 2];
      }
      packed_tile = tile + 1;
      const Tile at{first, num_packed, k, v, slot, next};
      const auto fold = item.count > NARROW ? fold_wide : item.count > GROUP ? fold_narrow : fold_few;
      fold(step, s, at, sight, (int)item.count);
    }
    for (int64_t m = 0; m < item.count; m++) {
      const float sum = _mm512_reduce_add_ps(_mm512_load_ps(s.split.sum[m]));
      if (item.partial >= 0) {
        float* to = partials + (item.partial + m) * (D + 2);
        std::memcpy(to, s.split.out[m], sizeof s.split.out[m]);
        to[D] = sum;
        to[D + 1] = s.split.top[m];
      } else {
        fold_partial(s.all.out[m], s.all.sum[m][0], s.all.top[m], s.split.out[m], sum,
                     s.split.top[m]);
      }
    }
  }
  if (item.partial >= 0) return;
  for (int64_t m = 0; m < item.count; m++)
    finish(step, segment.first_row + (item.first + m) / group,
           item.head * group + (int)((item.first + m) % group), s.all.out[m], s.all.sum[m][0],
           s.all.top[m]);
}

struct Pending {  // rows whose splits were computed apart
  int segment, head;
  int64_t count, partial, num_splits;
};

void run_pending(const Step& step, const Pending& pending, const float* partials) {
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

}  // namespace

extern "C" void paged_attention(const Call* call) {
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
      for (int64_t first = 0; first < num_folded; first += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, num_folded - first);
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
    Scratch* scratch = static_cast<Scratch*>(std::aligned_alloc(64, sizeof(Scratch)));
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) run_item(step, items[i], *scratch, partials.get());
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < pending.size(); i++) run_pending(step, pending[i], partials.get());
    std::free(scratch);
  }
}
