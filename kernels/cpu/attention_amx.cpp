// Attention over a paged cache for processors with AMX; what surrounds it is in attention.h.
//
// Sixteen rows stand side by side in everything: scores are K Q^T, results V^T P^T. So keys are
// read where they lie, maxima and sums go down the lanes, and weights are packed by one shuffle.
// Few rows or many, it is the same arithmetic.

#include "attention.h"

using namespace mnemosyne;

namespace {

constexpr int COLUMNS = 16;          // rows side by side
constexpr int MOST = 256 / COLUMNS;  // blocks of them that share a tile
constexpr int PAIRS = 32;            // elements of one dim or key: pairs of 16 rows

// Where the halves of a vector go when its elements are put in pairs.
alignas(64) const uint16_t PAIRED[32] = {0, 16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                         21, 6, 22, 7,  23, 8,  24, 9,  25, 10, 26,
                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// The tile registers, whose numbers must be constants. Compilers do not see what is read: all
// that was written must be in memory by then.
template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// C += A B: rows of A by columns of B, products of even and of odd elements summed apart.
template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Call body with 0 to N - 1 as compile-time constants.
template <int N, typename Body>
inline void for_each(Body body) {
  if constexpr (N > 0) {
    for_each<N - 1>(body);
    body(std::integral_constant<int, N - 1>());
  }
}

struct alignas(64) Block {  // 16 rows
  bf16 q[D / 32][16][PAIRS];  // pairs of dims, of each all rows
  float out[D][COLUMNS];
  float sum[COLUMNS], top[COLUMNS];  // largest score, in units of log2
};

struct alignas(64) Folds {
  static constexpr int BLOCK = MOST * COLUMNS;
  bf16 q[BLOCK][D];
  Block blocks[MOST];
  bf16 v[TILE / 32][D][32];     // of the tile at work, transposed
  bf16 k[TILE][D];              // of keys that are not neighbours where they lie
  float score[TILE][COLUMNS];   // of a block
  bf16 weight[TILE / 32][16][PAIRS];  // pairs of keys, of each all rows
  const bf16* keys[TILE / 16];
  Sight sight[BLOCK];
  int count;

  Folds() {
    struct {
      uint8_t palette = 1, start_row = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Folds() { asm volatile("tilerelease"); }

  int num_blocks() const { return (count + COLUMNS - 1) / COLUMNS; }

  void begin(const Sight* seen, int rows) {
    count = rows;
    const int padded = num_blocks() * COLUMNS;
    std::copy_n(seen, count, sight);
    std::fill(sight + count, sight + padded, seen[count - 1]);
    std::memset(q[count], 0, (padded - count) * sizeof q[0]);
    for (int b = 0; b < num_blocks(); b++)
      for (int d = 0; d < D; d += 32)
        pack_words([&](int i) { return q[b * COLUMNS + i] + d; }, blocks[b].q[d / 32][0], PAIRS);
  }

  void start() {
    for (int b = 0; b < num_blocks(); b++) {
      std::memset(blocks[b].out, 0, sizeof blocks[b].out);
      std::fill_n(blocks[b].sum, COLUMNS, 0.0f);
      std::fill_n(blocks[b].top, COLUMNS, NONE);
    }
  }

  void fold(const Step& step, const Tile& tile) {
    bool is_first = true;
    for (int b = 0; b < num_blocks(); b++) {
      const Sight first = sight[b * COLUMNS], last = sight[b * COLUMNS + COLUMNS - 1];
      if (last.high <= tile.first || first.low >= tile.first + TILE) continue;
      if (is_first) find_keys(step, tile);
      const bool is_whole = last.low <= tile.first && first.high >= tile.first + tile.num_keys;
      const auto fold = is_first ? is_whole ? &Folds::fold_block<true, true>
                                            : &Folds::fold_block<true, false>
                        : is_whole ? &Folds::fold_block<false, true>
                                   : &Folds::fold_block<false, false>;
      (this->*fold)(step, tile, b);
      is_first = false;
    }
  }

  void result(int m, float* out, float& sum, float& top) const {
    const Block& block = blocks[m / COLUMNS];
    const int column = m % COLUMNS;
    for (int d = 0; d < D; d++) out[d] = block.out[d][column];
    sum = block.sum[column];
    top = block.top[column];
  }

 private:
  // Where sixteen keys stand row after row: in the pool if they are neighbours there.
  void find_keys(const Step& step, const Tile& tile) {
    for (int j = 0; j < tile.num_keys; j += 16) {
      const int64_t* slot = tile.slot + j;
      keys[j / 16] = tile.k + slot[0] * D;
      if (step.page_size % 16 == 0 && slot[15] - slot[0] == 15) continue;
      keys[j / 16] = k[j];
      for (int i = 0; i < 16; i++) std::memcpy(k[j + i], tile.k + slot[i] * D, sizeof k[0]);
    }
  }

  // Transpose the values of 32 keys.
  void pack_values(const Tile& tile, int j) {
    const __m512i low = _mm512_load_si512(INTERLEAVED);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int d = 0; d < D; d += 16) {
      const __m512i half = d % 32 ? high : low;
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const bf16* a = tile.v + tile.slot[j + 2 * i] * D + d / 32 * 32;
        const bf16* b = tile.v + tile.slot[j + 2 * i + 1] * D + d / 32 * 32;
        r[i] = _mm512_permutex2var_epi16(_mm512_loadu_si512(a), half, _mm512_loadu_si512(b));
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) _mm512_store_si512(v[j / 32][d + i], r[i]);
    }
  }

  // Scores of 64 keys against the rows of a block.
  void score_keys(const Block& block, int j) {
    for_each<4>([](auto g) { tile_zero<g>(); });
    for (int d = 0; d < D / 32; d++) {
      tile_load<4>(block.q[d], 64);
      for_each<4>([&](auto g) {
        tile_load<5 + g % 3>(keys[j / 16 + g] + 32 * d, 2 * D);
        tile_multiply<g, 5 + g % 3, 4>();
      });
    }
    for_each<4>([&](auto g) { tile_store<g>(score[j + 16 * g], 64); });
  }

  // Add the weighted values of 32 keys to N times 16 dims, from dim d on.
  template <int N>
  void add_values(int d, int j) {
    tile_load<4>(weight[j / 32], 64);
    for_each<N>([&](auto g) {
      tile_load<5 + g % 3>(v[j / 32][d + 16 * g], 64);
      tile_multiply<g, 5 + g % 3, 4>();
    });
  }

  template <int N>
  void load_sums(const Block& block, int d) {
    for_each<N>([&](auto g) { tile_load<g>(block.out[d + 16 * g], 64); });
  }

  template <int N>
  void store_sums(Block& block, int d) {
    for_each<N>([&](auto g) { tile_store<g>(block.out[d + 16 * g], 64); });
  }

  template <bool IS_FIRST, bool IS_WHOLE>
  void fold_block(const Step& step, const Tile& tile, int b) {
    Block& block = blocks[b];
    const __m512 none = _mm512_set1_ps(NONE);
    __m512i low, high;  // what each row may see, in keys of the tile
    if (!IS_WHOLE) {
      alignas(64) int32_t from[COLUMNS], to[COLUMNS];
      for (int i = 0; i < COLUMNS; i++) {
        const Sight& seen = sight[b * COLUMNS + i];
        from[i] = (int32_t)std::clamp<int64_t>(seen.low - tile.first, 0, TILE);
        to[i] = (int32_t)std::clamp<int64_t>(seen.high - tile.first, 0, TILE);
      }
      low = _mm512_load_si512(from), high = _mm512_load_si512(to);
    }
    const auto mask_of = [&](int j) {
      const __m512i key = _mm512_set1_epi32(j);
      return _mm512_cmple_epi32_mask(low, key) & _mm512_cmplt_epi32_mask(key, high);
    };

    __m512 tops[4] = {none, none, none, none};
    for (int j = 0; j < tile.num_keys; j += 64) {
      score_keys(block, j);
      for (int i = j; i < j + 64; i += 4)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const __m512 x = _mm512_load_ps(score[i + n]);
          tops[n] = IS_WHOLE ? _mm512_max_ps(tops[n], x)
                             : _mm512_mask_max_ps(tops[n], mask_of(i + n), tops[n], x);
        }
    }
    const __m512 scale = _mm512_set1_ps(step.scale);
    const __m512 old = _mm512_load_ps(block.top);
    __m512 now = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    now = _mm512_max_ps(old, _mm512_mul_ps(now, scale));
    _mm512_store_ps(block.top, now);
    // Where nothing was seen before, there is nothing to shrink.
    const __mmask16 grown = _mm512_cmp_ps_mask(old, now, _CMP_LT_OQ) &
                            _mm512_cmp_ps_mask(old, none, _CMP_NEQ_OQ);
    if (grown) {
      const __m512 alpha =
          _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grown, exp2_of(_mm512_sub_ps(old, now)));
      for (int d = 0; d < D; d++)
        _mm512_store_ps(block.out[d], _mm512_mul_ps(_mm512_load_ps(block.out[d]), alpha));
      _mm512_store_ps(block.sum, _mm512_mul_ps(_mm512_load_ps(block.sum), alpha));
    }
    const __m512 shift = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, none, _CMP_NEQ_OQ), now);
    const __m512i paired = _mm512_load_si512(PAIRED);
    constexpr int N = std::min(4, D / 16);
    load_sums<N>(block, 0);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < tile.num_keys; j += 32) {
      if (IS_FIRST) pack_values(tile, j);
#pragma GCC unroll 4
      for (int i = 0; i < 32; i += 2) {
        for (int n = i; IS_FIRST && n < i + 2; n++) {  // a few at a time keep the memory at work
          prefetch(tile.k + tile.next[j + n] * D);
          prefetch(tile.v + tile.next[j + n] * D);
        }
        __m512 x = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score[j + i]), scale, shift));
        __m512 y = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score[j + i + 1]), scale, shift));
        if (!IS_WHOLE) {
          x = _mm512_maskz_mov_ps(mask_of(j + i), x);
          y = _mm512_maskz_mov_ps(mask_of(j + i + 1), y);
        }
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        _mm512_store_si512(weight[j / 32][i / 2],
                           _mm512_permutexvar_epi16(paired, (__m512i)_mm512_cvtne2ps_pbh(y, x)));
      }
      add_values<N>(0, j);
    }
    store_sums<N>(block, 0);
    _mm512_store_ps(block.sum, _mm512_add_ps(_mm512_load_ps(block.sum), sum));
    constexpr int LEFT = D / 16 - N;
    for_each<(LEFT + 3) / 4>([&](auto g) {
      constexpr int M = std::min(4, LEFT - 4 * g);
      const int d = 64 * (g + 1);
      load_sums<M>(block, d);
      for (int j = 0; j < tile.num_keys; j += 32) add_values<M>(d, j);
      store_sums<M>(block, d);
    });
  }
};

}  // namespace

extern "C" void paged_attention(const Call* call) { attend<Folds>(call); }
