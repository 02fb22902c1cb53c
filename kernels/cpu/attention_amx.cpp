// Attention over a paged cache for processors with AMX; the loop around it lies in attention.h.
//
// Rows stand side by side: scores are K Q^T, so keys are read where they lie, maxima and sums go
// down the lanes, and weights are packed by one shuffle. Results of many rows are V^T P^T, for which
// the values of a tile are transposed once; those of few are P V, for which it is the weights. Either
// way it is the same arithmetic.
//
// Products of tiles and exponentials do not overlap (they share a port), and blocks of rows read K
// and V from the L2 cache at a rate that matters: so a block is two tiles wide.

#include "amx.h"
#include "tiles.h"
#include "attention.h"

using namespace mnemosyne;

namespace {

constexpr int LANES = 16;  // rows side by side in a vector
constexpr int WIDE = 2;   // vectors of them in a block
constexpr int COLUMNS = WIDE * LANES;
constexpr int MOST = 256 / COLUMNS;  // blocks that share a tile
constexpr int PAIRS = 32;            // elements of one dim or key: pairs of 16 rows

struct alignas(64) Block {
  bf16 q[D / 32][WIDE][16][PAIRS];  // pairs of dims, of each all rows
  float out[D / 16][WIDE][16][16];  // of 16 dims all rows; the other way round if there are few
  float sum[COLUMNS], top[COLUMNS];  // largest score, in units of log2
};

// Keys of a tile that each of sixteen rows may see.
struct Mask {
  __m512i low, high;

  Mask(const Sight* sight, int64_t first) {
    alignas(64) int32_t from[LANES], to[LANES];
    for (int i = 0; i < LANES; i++) {
      from[i] = (int32_t)std::clamp<int64_t>(sight[i].low - first, 0, TILE);
      to[i] = (int32_t)std::clamp<int64_t>(sight[i].high - first, 0, TILE);
    }
    low = _mm512_load_si512(from), high = _mm512_load_si512(to);
  }

  __mmask16 operator()(int j) const {
    const __m512i key = _mm512_set1_epi32(j);
    return _mm512_cmple_epi32_mask(low, key) & _mm512_cmplt_epi32_mask(key, high);
  }
};

struct alignas(64) Folds {
  static constexpr int BLOCK = MOST * COLUMNS;
  bf16 q[BLOCK][D];
  Block blocks[MOST];
  bf16 v[TILE / 32][D / 16][16][32];  // of the tile at work, for products
  bf16 k[TILE][D];                    // of keys that are not neighbours where they lie
  float score[WIDE][TILE][LANES];     // of a block
  bf16 weight[TILE / 32][WIDE][16][PAIRS];  // pairs of keys, of each all rows; turned if few
  const bf16* keys[TILE / 16];
  Sight sight[BLOCK];
  int count;

  Folds() { configure_tiles(TileConfig{}); }
  ~Folds() { release_tiles(); }

  int num_blocks() const { return (count + COLUMNS - 1) / COLUMNS; }
  bool are_few() const { return count <= LANES; }

  void begin(const Sight* seen, int rows) {
    count = rows;
    const int padded = num_blocks() * COLUMNS;
    std::copy_n(seen, count, sight);
    std::fill(sight + count, sight + padded, seen[count - 1]);
    std::memset(q[count], 0, (padded - count) * sizeof q[0]);
    for (int m = 0; m < padded; m += LANES)
      for (int d = 0; d < D; d += 32)
        pack_words([&](int i) { return q[m + i] + d; },
                   blocks[m / COLUMNS].q[d / 32][m / LANES % WIDE][0], PAIRS);
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
      const auto fold = are_few() ? is_whole ? &Folds::fold_block<1, true, true>
                                             : &Folds::fold_block<1, true, false>
                        : is_first ? is_whole ? &Folds::fold_block<WIDE, true, true>
                                              : &Folds::fold_block<WIDE, true, false>
                        : is_whole ? &Folds::fold_block<WIDE, false, true>
                                   : &Folds::fold_block<WIDE, false, false>;
      (this->*fold)(step, tile, b);
      is_first = false;
    }
  }

  void result(int m, float* out, float& sum, float& top) const {
    const Block& block = blocks[m / COLUMNS];
    const int column = m % COLUMNS, lane = m % LANES;
    for (int d = 0; d < D; d++) {
      const auto& tile = block.out[d / 16][column / LANES];
      out[dim_of(d / 16, d % 16)] = are_few() ? tile[lane][d % 16] : tile[d % 16][lane];
    }
    sum = block.sum[column];
    top = block.top[column];
  }

 private:
  // Dim that is the n-th of 16 after unpacking.
  static constexpr int dim_of(int d, int n) { return d / 2 * 32 + n / 4 * 8 + d % 2 * 4 + n % 4; }

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

  // Values of two keys, element by element side by side, as a row of each tile.
  static void pair_values(const Tile& tile, int j, bf16 (*to)[16][PAIRS], int row) {
    for (int d = 0; d < D; d += 32) {
      const __m512i a = _mm512_loadu_si512(tile.v + tile.slot[j] * D + d);
      const __m512i b = _mm512_loadu_si512(tile.v + tile.slot[j + 1] * D + d);
      _mm512_store_si512(to[d / 16][row], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(to[d / 16 + 1][row], _mm512_unpackhi_epi16(a, b));
    }
  }

  // Values of 32 keys, transposed.
  void turn_values(const Tile& tile, int j) {
    auto& tiles = v[j / 32];
    for (int i = 0; i < 32; i += 2) pair_values(tile, j + i, tiles, i / 2);
    for (auto& pairs : tiles) pack_words([&](int i) { return pairs[i]; }, pairs[0], PAIRS);
  }

  // Scores of the tile against the rows of a block. Queries stay in the tile registers if they fit.
  template <int N, bool IS_FIRST>
  void score_keys(const Tile& tile, const Block& block) {
    constexpr bool FIT = D <= 64;
    const auto load_queries = [&](auto d) {
      for_each<N>([&](auto n) { tile_load<2 * (d % 2) + n>(block.q[d][n], 64); });
    };
    if (FIT) for_each<D / 32>(load_queries);
    for (int j = 0; j < tile.num_keys; j += 16) {
      for_each<N>([](auto n) { tile_zero<4 + n>(); });
      for_each<D / 32>([&](auto d) {
        if (!FIT) load_queries(d);
        tile_load<6 + d % 2>(keys[j / 16] + 32 * d, 2 * D);
        for_each<N>([&](auto n) { tile_multiply<4 + n, 6 + d % 2, 2 * (d % 2) + n>(); });
      });
      for_each<N>([&](auto n) { tile_store<4 + n>(score[n][j], 64); });
      // Half of the next tile's keys start on their way here, the other half and its values while
      // this one is weighed: spread evenly, they keep the memory at work all the time.
      for (int i = j / 2; IS_FIRST && i < j / 2 + 8; i++) prefetch(tile.k + tile.next[i] * D);
    }
  }

  // Take the largest scores of a tile into account; returns the value to subtract from all.
  __m512 raise_top(Block& block, int n, __m512 now) {
    float *sum = block.sum + LANES * n, *top = block.top + LANES * n;
    const __m512 none = _mm512_set1_ps(NONE), old = _mm512_load_ps(top);
    now = _mm512_max_ps(old, now);
    _mm512_store_ps(top, now);
    // Where nothing was seen before, there is nothing to shrink.
    const __mmask16 grown = _mm512_cmp_ps_mask(old, now, _CMP_LT_OQ) &
                            _mm512_cmp_ps_mask(old, none, _CMP_NEQ_OQ);
    if (grown) {
      const __m512 alpha =
          _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), grown, exp2_of(_mm512_sub_ps(old, now)));
      alignas(64) float factors[16][LANES];  // of the rows of a tile of results
      alignas(64) float each[LANES];
      _mm512_store_ps(each, alpha);
      for (int i = 0; i < 16; i++)
        _mm512_store_ps(factors[i], are_few() ? _mm512_set1_ps(each[i]) : alpha);
      for (int d = 0; d < D / 16; d++)
        for (int i = 0; i < 16; i++) {
          float* out = block.out[d][n][i];
          _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), _mm512_load_ps(factors[i])));
        }
      _mm512_store_ps(sum, _mm512_mul_ps(_mm512_load_ps(sum), alpha));
    }
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(now, none, _CMP_NEQ_OQ), now);
  }

  // Results of 16 * M dims from dim 16 * d on.
  template <int N, int M>
  static void load_sums(const Block& block, int d) {
    for_each<M>([&](auto m) {
      for_each<N>([&](auto n) { tile_load<N * m + n>(block.out[d + m][n], 64); });
    });
  }

  template <int N, int M>
  static void store_sums(Block& block, int d) {
    for_each<M>([&](auto m) {
      for_each<N>([&](auto n) { tile_store<N * m + n>(block.out[d + m][n], 64); });
    });
  }

  // Add the weighted values of 32 keys.
  template <int N, int M>
  void add_values(int d, const bf16 (*values)[16][32], const bf16 (*weights)[16][PAIRS]) {
    for_each<N>([&](auto n) { tile_load<4 + n>(weights[n], 64); });
    for_each<M>([&](auto m) {
      tile_load<6 + m % 2>(values[d + m], 64);
      for_each<N>([&](auto n) {
        if (N == 1)
          tile_multiply<N * m + n, 4 + n, 6 + m % 2>();
        else
          tile_multiply<N * m + n, 6 + m % 2, 4 + n>();
      });
    });
  }

  // The largest score of each of sixteen rows.
  template <bool IS_WHOLE>
  __m512 largest(const Tile& tile, const Mask& mask, int n) const {
    __m512 tops[4];
    for (auto& top : tops) top = _mm512_set1_ps(NONE);
    for (int j = 0; j < tile.num_keys; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512 x = _mm512_load_ps(score[n][j + i]);
        tops[i] = IS_WHOLE ? _mm512_max_ps(tops[i], x)
                           : _mm512_mask_max_ps(tops[i], mask(j + i), tops[i], x);
      }
    return _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
  }

  template <int N, bool IS_FIRST, bool IS_WHOLE>
  void fold_block(const Step& step, const Tile& tile, int b) {
    constexpr bool ARE_FEW = N == 1;
    constexpr int M = ARE_FEW && D % 64 == 0 ? 4 : 2;  // tiles of results side by side
    constexpr int KEPT = ARE_FEW && D / 16 == M ? 2 : TILE / 32;  // two stay in the L1 cache
    Block& block = blocks[b];
    const Sight* seen = sight + b * COLUMNS;
    const Mask masks[2] = {{seen, tile.first}, {seen + (N - 1) * LANES, tile.first}};
    const __m512i paired = _mm512_load_si512(PAIRED);
    const __m512 scale = _mm512_set1_ps(step.scale);
    score_keys<N, IS_FIRST>(tile, block);
    __m512 shift[N], sum[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      const __m512 top = largest<IS_WHOLE>(tile, masks[n], n);
      shift[n] = raise_top(block, n, _mm512_mul_ps(top, scale));
      sum[n] = _mm512_setzero_ps();
    }
    const auto weigh = [&](int j, int i) {  // two keys
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        __m512 x = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score[n][j + i]), scale, shift[n]));
        __m512 y = exp2_of(_mm512_fmsub_ps(_mm512_load_ps(score[n][j + i + 1]), scale, shift[n]));
        if (!IS_WHOLE) {
          x = _mm512_maskz_mov_ps(masks[n](j + i), x);
          y = _mm512_maskz_mov_ps(masks[n](j + i + 1), y);
        }
        sum[n] = _mm512_add_ps(sum[n], _mm512_add_ps(x, y));
        _mm512_store_si512(weight[j / 32 % KEPT][n][i / 2],
                           _mm512_permutexvar_epi16(paired, (__m512i)_mm512_cvtne2ps_pbh(y, x)));
      }
    };
    const auto add = [&](int d, int i) { add_values<N, M>(d, v[i % KEPT], weight[i % KEPT]); };
    load_sums<N, M>(block, 0);
    for (int j = 0; j < tile.num_keys; j += 32) {
      if (IS_FIRST && !ARE_FEW) turn_values(tile, j);
      if (j) add(0, j / 32 - 1);  // values that were just stored are not read at once
#pragma GCC unroll 4
      for (int i = 0; i < 32; i += 2) {
        if (IS_FIRST) {
          prefetch(tile.k + tile.next[(TILE + j + i) / 2] * D);
          prefetch(tile.v + tile.next[j + i] * D);
          prefetch(tile.v + tile.next[j + i + 1] * D);
        }
        if (ARE_FEW) pair_values(tile, j + i, v[j / 32 % KEPT], i / 2);
        weigh(j, i);
      }
      auto& weights = weight[j / 32 % KEPT][0];
      if (ARE_FEW) pack_words([&](int i) { return weights[i]; }, weights[0], PAIRS);
    }
    const int last = tile.num_keys / 32 - 1;
    add(0, last);
    store_sums<N, M>(block, 0);
    for (int d = M; d < D / 16; d += M) {
      load_sums<N, M>(block, d);
      for (int i = 0; i <= last; i++) add(d, i);
      store_sums<N, M>(block, d);
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; n++) {
      float* to = block.sum + LANES * n;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), sum[n]));
    }
  }
};

}  // namespace

extern "C" void paged_attention(const Call* call) { attend<Folds>(call); }
