// y = x W^T + b in bfloat16 for few rows of x, where reading W bounds the speed: W is read once,
// in the order it lies in memory.
//
// Every output is summed in the same order whatever the number of rows: the bits of a row of y
// depend on that row of x alone.

#include "tiles.h"

using namespace mnemosyne;

namespace {

constexpr int WIDTH = 4;   // outputs at a time: 6 x 4 sums fill the registers
constexpr int CHUNK = 64;  // outputs that a thread takes at a time
constexpr int AHEAD = 16;  // outputs between what is computed and what is on its way from memory

struct Product {
  const bf16* x;
  int64_t x_stride;
  const bf16* w;
  const bf16* bias;
  bf16* y;
  int64_t num_rows, num_outputs, num_columns;
};

// The sums of the elements of four vectors.
inline __m128 sum_each(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline void store(const Product& p, int64_t row, int64_t output, __m128 sum) {
  const int count = (int)std::min<int64_t>(WIDTH, p.num_outputs - output);
  const __mmask8 mask = (__mmask8)((1u << count) - 1);
  if (p.bias) {
    const __m128i b = _mm_maskz_loadu_epi16(mask, p.bias + output);
    sum = _mm_add_ps(sum, _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(b), 16)));
  }
  _mm_mask_storeu_epi16(p.y + row * p.num_outputs + output, mask, (__m128i)_mm_cvtneps_pbh(sum));
}

template <int R>
inline void multiply_rows(const Product& p, int64_t row, int64_t output, const bf16* const w[WIDTH],
                          bool is_first) {
  const bf16* x = p.x + row * p.x_stride;
  __m512 acc[R][WIDTH];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) acc[r][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.num_columns; k += 32) {
    __m512bh b[WIDTH];
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) {
      b[n] = (__m512bh)_mm512_loadu_si512(w[n] + k);
      // the same place of the next outputs; the first rows bring it from memory for all
      if (is_first) _mm_prefetch((const char*)(w[n] + k + AHEAD * p.num_columns), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * p.x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < WIDTH; n++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    store(p, row + r, output, sum_each(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
}

void run_outputs(const Product& p, int64_t output) {
  const bf16* w[WIDTH];
  for (int n = 0; n < WIDTH; n++)
    w[n] = p.w + std::min(output + n, p.num_outputs - 1) * p.num_columns;
  for (int64_t row = 0; row < p.num_rows; row += GROUP)
    for_rows((int)std::min<int64_t>(GROUP, p.num_rows - row),
             [&](auto R) { multiply_rows<R>(p, row, output, w, row == 0); });
}

}  // namespace

extern "C" void linear(const bf16* x, int64_t x_stride, const bf16* w, const bf16* bias, bf16* y,
                       int64_t num_rows, int64_t num_outputs, int64_t num_columns,
                       int64_t num_threads) {
  const Product p{x, x_stride, w, bias, y, num_rows, num_outputs, num_columns};
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)num_threads)
  for (int64_t first = 0; first < num_outputs; first += CHUNK)
    for (int64_t output = first; output < std::min(first + CHUNK, num_outputs); output += WIDTH)
      run_outputs(p, output);
}
