// Attention over a paged cache for AVX-512 BF16 processors; the loop around it lies in attention.h.

#include "tiles.h"
#include "attention.h"

using namespace mnemosyne;

namespace {

constexpr int BLOCK = 192;  // folded rows that share a packed tile
constexpr int NARROW = 18;  // folded rows up to which reading bounds the speed

// State of a block of rows, carried from tile to tile.
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
  Running split;
};

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

// Scores of a tile become weights; the sums of R rows follow. alpha: the factor on earlier sums.
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

struct Folds : Scratch {
  static constexpr int BLOCK = ::BLOCK;
  const Sight* sight;
  int count;

  void begin(const Sight* seen, int rows) { sight = seen, count = rows; }

  void start() {
    std::memset(split.out, 0, count * sizeof split.out[0]);
    std::memset(split.sum, 0, count * sizeof split.sum[0]);
    std::fill_n(split.top, count, NONE);
  }

  void fold(const Step& step, const Tile& tile) {
    const auto by_count = count > NARROW ? fold_wide : count > GROUP ? fold_narrow : fold_few;
    by_count(step, *this, tile, sight, count);
  }

  void result(int m, float* out, float& sum, float& top) const {
    std::memcpy(out, split.out[m], sizeof split.out[m]);
    sum = _mm512_reduce_add_ps(_mm512_load_ps(split.sum[m]));
    top = split.top[m];
  }
};

}  // namespace

extern "C" void paged_attention(const Call* call) { attend<Folds>(call); }
