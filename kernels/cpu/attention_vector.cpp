// Attention over a paged cache for any vectors, in float32 inside; the loop around it lies in
// attention.h. However many rows are computed, a score is the sum of LANES sums, each over every
// LANES-th element of a key, and an output a sum over keys in their order. Few rows find a score
// along the lanes, many rows find those of LANES keys side by side.

#define TILE_KEYS 128
#include "vector.h"
#include "attention.h"

using namespace mnemosyne;

namespace {

constexpr int BLOCK = 192;           // folded rows that share a packed tile
constexpr int PANEL = SPAN * LANES;  // keys that lie side by side in a packed tile
// vectors of an output that a product takes: a divisor of D
constexpr int WIDE = D % (SPAN * LANES) ? 2 : SPAN;

// C[R][WIDE LANES] = alpha[R] C + A[R][depth] B
template <int R>
inline void add_product(const float* a, const float* b, float* c, int depth, const float* alpha) {
  vec acc[R][WIDE];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < WIDE; n++) acc[r][n] = load(c + r * D + LANES * n) * all(alpha[r]);
  for (int p = 0; p < depth; p++) {
    vec row[WIDE];
#pragma GCC unroll 8
    for (int n = 0; n < WIDE; n++) row[n] = load(b + p * D + LANES * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec x = all(a[r * TILE + p]);
#pragma GCC unroll 8
      for (int n = 0; n < WIDE; n++) acc[r][n] = fma(x, row[n], acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < WIDE; n++) store(c + r * D + LANES * n, acc[r][n]);
}

// The sums over elements START, START + STEP, ... of R rows with PANEL packed keys, joined as
// sum_of joins the lanes of a vector.
template <int R, int START, int STEP>
inline void sum_elements(const float* q, const float* k, vec acc[R][SPAN]) {
  if constexpr (STEP < LANES) {
    vec more[R][SPAN];
    sum_elements<R, START, 2 * STEP>(q, k, acc);
    sum_elements<R, START + STEP, 2 * STEP>(q, k, more);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < SPAN; n++) acc[r][n] += more[r][n];
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < SPAN; n++) acc[r][n] = vec{};
  for (int d = START; d < D; d += LANES) {
    vec key[SPAN];
#pragma GCC unroll 8
    for (int n = 0; n < SPAN; n++) key[n] = load(k + d * PANEL + LANES * n);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec x = all(q[r * D + d]);
#pragma GCC unroll 8
      for (int n = 0; n < SPAN; n++) acc[r][n] = fma(x, key[n], acc[r][n]);
    }
  }
}

// State of a block of rows, carried from tile to tile.
struct alignas(64) Running {
  float out[BLOCK][D];
  float sum[BLOCK][LANES];
  float top[BLOCK];  // largest score, in units of log2
};

struct alignas(64) Scratch {
  element q[BLOCK][D];
  float wide_q[BLOCK][D];
  float k[TILE * D];  // [TILE / PANEL][D][PANEL]
  float v[TILE * D];
  float score[GROUP][TILE];  // and then the weights
  float alpha[GROUP];
  Running split;
};

// LANES columns of LANES keys, from element d on.
inline void load_columns(const element* k, const int64_t* slot, int d, vec column[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) column[i] = widen(k + slot[i] * D + d);
  transpose(column);
}

void pack_keys(const Tile& tile, float* packed) {
  for (int j = 0; j < tile.num_keys; j += LANES) {
    float* to = packed + j / PANEL * (PANEL * D) + j % PANEL;
    for (int i = 0; i < LANES; i++) prefetch(tile.k + tile.next[j + i] * D);
    for (int d = 0; d < D; d += LANES) {
      vec column[LANES];
      load_columns(tile.k, tile.slot + j, d, column);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) store(to + (d + i) * PANEL, column[i]);
    }
  }
}

void pack_values(const Tile& tile, float* packed) {
  for (int j = 0; j < tile.num_keys; j++) {
    const element* from = tile.v + tile.slot[j] * D;
    prefetch(tile.v + tile.next[j] * D);
    for (int d = 0; d < D; d += LANES) store(packed + j * D + d, widen(from + d));
  }
}

// The lanes whose keys, the first of them `key`, a row sees.
inline ints seen_lanes(const Sight& sight, int64_t key) {
  ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  const int low = (int)std::clamp<int64_t>(sight.low - key, 0, LANES);
  const int high = (int)std::clamp<int64_t>(sight.high - key, 0, LANES);
  return (lane >= low) & (lane < high);
}

// Scores of a tile become weights; the sums of R rows follow. alpha: the factor on earlier sums.
template <int R>
inline void weigh_keys(const Step& step, Scratch& s, int m, const Sight* sight, const Tile& tile) {
  for (int r = 0; r < R; r++) {
    float* score = s.score[r];
    const Sight& seen = sight[m + r];
    const bool is_whole = seen.low <= tile.first && seen.high >= tile.first + tile.num_keys;
    vec top = all(NONE);
    for (int j = 0; j < tile.num_keys; j += LANES) {
      const vec x = load(score + j);
      top = larger(top, is_whole ? x : seen_lanes(seen, tile.first + j) ? x : all(NONE));
    }
    const float old = s.split.top[m + r];
    const float now = std::max(old, largest_of(top) * step.scale);
    s.alpha[r] = old == now ? 1.0f : exp2_scalar(old - now);
    s.split.top[m + r] = now;
    const vec shift = all(now == NONE ? 0.0f : now);
    vec sum = load(s.split.sum[m + r]) * all(s.alpha[r]);
    for (int j = 0; j < tile.num_keys; j += LANES) {
      vec x = exp2_of(fma(load(score + j), all(step.scale), -shift));
      if (!is_whole) x = seen_lanes(seen, tile.first + j) ? x : vec{};
      sum += x;
      store(score + j, x);
    }
    store(s.split.sum[m + r], sum);
  }
}

// Many rows: pack the tile once, then take the rows by groups.
void fold_wide(const Step& step, Scratch& s, const Tile& tile, const Sight* sight, int count) {
  pack_keys(tile, s.k);
  pack_values(tile, s.v);
  for (int m = 0; m < count; m += GROUP) {
    const int rows = std::min(GROUP, count - m);
    if (sight[m + rows - 1].high <= tile.first || sight[m].low >= tile.first + TILE) continue;
    for_rows(rows, [&](auto R) {
      for (int j = 0; j < tile.num_keys; j += PANEL) {
        vec sums[R][SPAN];
        sum_elements<R, 0, 1>(s.wide_q[m], s.k + j * D, sums);
        for (int r = 0; r < R; r++)
          for (int n = 0; n < SPAN; n++) store(&s.score[r][j + n * LANES], sums[r][n]);
      }
      weigh_keys<R>(step, s, m, sight, tile);
      for (int d = 0; d < D; d += WIDE * LANES)
        add_product<R>(s.score[0], s.v + d, &s.split.out[m][d], tile.num_keys, s.alpha);
    });
  }
}

// The scores of R rows against 8 keys, straight from where the keys lie.
template <int R>
inline void score_from_pool(Scratch& s, const Tile& tile, int j) {
  constexpr int NK = R == 1 ? 8 : R <= 3 ? 4 : 2;  // keys at a time: their sums hide the latency
  vec sums[R][8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += NK) {
    vec acc[R][NK];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NK; n++) acc[r][n] = vec{};
    for (int d = 0; d < D; d += LANES) {
      vec key[NK];
#pragma GCC unroll 8
      for (int n = 0; n < NK; n++) key[n] = widen(tile.k + tile.slot[j + i + n] * D + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec x = load(s.wide_q[r] + d);
#pragma GCC unroll 8
        for (int n = 0; n < NK; n++) acc[r][n] = fma(x, key[n], acc[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NK; n++) sums[r][i + n] = acc[r][n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    sum_each(sums[r], &s.score[r][j]);
    sum_each(sums[r] + 4, &s.score[r][j + 4]);
  }
}

// Add the weighted values of a tile to R rows, straight from where the values lie.
template <int R>
inline void add_from_pool(Scratch& s, const Tile& tile) {
  constexpr int NV = 2;
  for (int d = 0; d < D; d += NV * LANES) {
    vec acc[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++)
        acc[r][n] = load(&s.split.out[r][d + n * LANES]) * all(s.alpha[r]);
    for (int j = 0; j < tile.num_keys; j++) {
      const element* v = tile.v + tile.slot[j] * D + d;
      if (d % (64 / sizeof(element)) == 0) prefetch_line(tile.v + tile.next[j] * D + d);
      vec row[NV];
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) row[n] = widen(v + n * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec weight = all(s.score[r][j]);
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) acc[r][n] = fma(weight, row[n], acc[r][n]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) store(&s.split.out[r][d + n * LANES], acc[r][n]);
  }
}

// A decode of one request: no tile is packed, each key and value is read once.
void fold_few(const Step& step, Scratch& s, const Tile& tile, const Sight* sight, int count) {
  for_rows(count, [&](auto R) {
    for (int j = 0; j < tile.num_keys; j += 8) {
      for (int i = 0; i < 8; i++) prefetch(tile.k + tile.next[j + i] * D);
      score_from_pool<R>(s, tile, j);
    }
    weigh_keys<R>(step, s, 0, sight, tile);
    add_from_pool<R>(s, tile);
  });
}

struct Folds : Scratch {
  static constexpr int BLOCK = ::BLOCK;
  const Sight* sight;
  int count;

  void begin(const Sight* seen, int rows) {
    sight = seen, count = rows;
    for (int m = 0; m < rows; m++)
      for (int d = 0; d < D; d += LANES) store(wide_q[m] + d, widen(q[m] + d));
  }

  void start() {
    std::memset(split.out, 0, count * sizeof split.out[0]);
    std::memset(split.sum, 0, count * sizeof split.sum[0]);
    std::fill_n(split.top, count, NONE);
  }

  void fold(const Step& step, const Tile& tile) {
    (count > GROUP ? fold_wide : fold_few)(step, *this, tile, sight, count);
  }

  void result(int m, float* out, float& sum, float& top) const {
    std::memcpy(out, split.out[m], sizeof split.out[m]);
    sum = sum_of(load(split.sum[m]));
    top = split.top[m];
  }
};

}  // namespace

extern "C" void paged_attention(const Call* call) { attend<Folds>(call); }
