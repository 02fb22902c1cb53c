// Products of 32 outputs by 32 rows on the tiles of AMX, and the ways out of them.

#pragma once

#include "amx.h"
#include "linear.h"

namespace mnemosyne {

constexpr int SIDE = 16;         // outputs or rows of a tile
constexpr int STEP = 32;         // columns of a tile
constexpr int WIDTH = 2 * SIDE;  // outputs and rows at a time
constexpr int WAKE = 8 * STEP;   // columns between tile stores that nobody reads

struct Unit {  // 32 outputs, or sixteen gate outputs and the sixteen up outputs they multiply
  const bf16* w[2];
  int64_t count[2];  // of outputs that there are
  alignas(64) float bias[2][SIDE];
};

struct Slice {  // of the columns
  int64_t begin, end;
};

struct alignas(64) Sums {
  float of[2][2][SIDE][SIDE];  // by half of the unit, rows by 16, output, row
};

struct Ahead {  // the weights of the next unit, of which each step fetches some
  const bf16* w;
  int64_t length, skipped;  // elements of a row of w that are needed, and between two rows
  int lines;                // of w for a step
  int64_t done = 0;         // elements of the row
  bf16* y = nullptr;        // where the sums go, a row for a step
  int64_t y_stride = 0, num_rows = 0;

  void step() {
    for (int i = 0; i < lines; i++, w += STEP, done += STEP) {
      if (done == length) w += skipped, done = 0;
      _mm_prefetch((const char*)w, _MM_HINT_T1);
    }
    if (num_rows-- > 0) {
      asm volatile("prefetchw %0" ::"m"(*y));
      y += y_stride;
    }
  }
};

// The tiles as a thread has them: of as many rows as a unit has outputs, because the memory
// behind these may belong to something else.
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

// The sums of a unit over a slice for R times 16 packed rows, on top of those of earlier slices.
template <int R>
inline void multiply_unit(const Unit& unit, const bf16* x, int64_t num_columns, Slice slice,
                          Ahead& coming, Sums& sums) {
  const int64_t stride = num_columns * sizeof(bf16);
  alignas(64) float unread[SIDE];
  for_each<2 * R>([&](auto i) {
    constexpr int T = i / R * 2 + i % R;
    slice.begin ? tile_load<T>(sums.of[i / R][i % R], 64) : tile_zero<T>();
  });
  Ahead ahead = coming;
  for (int64_t k = slice.begin; k < slice.end; k += STEP) {
    ahead.step();
    for_each<R>([&](auto r) { tile_load<6 + r>(x + SIDE * (r * num_columns + k), 64); });
    for_each<2>([&](auto half) {
      constexpr int H = half;
      tile_load<4 + H>(unit.w[H] + k, stride);
      for_each<R>([](auto r) { tile_multiply<2 * H + r, 4 + H, 6 + r>(); });
    });
    // The first tile store after 600 ns without one takes 300.
    if (k % WAKE == 0) tile_store<4>(unread, 0);
  }
  coming = ahead;
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

inline void store(const Unit& unit, const Sums& sums, bf16* y, int64_t y_stride, int64_t num_rows) {
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
inline void store_gated(const Unit& unit, const Sums& sums, bf16* y, int64_t y_stride,
                        int64_t num_rows) {
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

}  // namespace mnemosyne
