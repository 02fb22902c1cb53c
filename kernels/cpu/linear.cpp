// y = x W^T + b in bfloat16 for few rows of x, where reading W bounds the speed: W is read once,
// in the order it lies in memory. Several layers of the same input are computed in one call.
//
// Every output is summed in the same order whatever the number of rows: the bits of a row of y
// depend on that row of x alone.

#include "linear.h"

using namespace mnemosyne;

namespace {

constexpr int WIDTH = 4;   // outputs at a time: 6 x 4 sums fill the registers
constexpr int CHUNK = 64;  // outputs that a thread takes at a time
constexpr int AHEAD = 16;  // outputs between the one that is computed and the one that is being fetched

struct Input {
  const bf16* x;
  int64_t stride, num_rows, num_columns;
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

inline __mmask8 mask_of(const Part& part, int64_t output) {
  return (__mmask8)((1u << std::min<int64_t>(WIDTH, part.num_outputs - output)) - 1);
}

// WIDTH outputs of R rows.
template <int R>
inline void multiply_rows(const Input& in, const Part& part, int64_t row, int64_t output,
                          __m128 y[R]) {
  const bf16* x = in.x + row * in.stride;
  const bf16* w[WIDTH];
  for (int n = 0; n < WIDTH; n++)
    w[n] = part.w + std::min(output + n, part.num_outputs - 1) * in.num_columns;
  __m512 acc[R][WIDTH];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) acc[r][n] = _mm512_setzero_ps();
  if (R <= 2) {
    // One output after the other: a stream that the processor itself fetches ahead.
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++)
      for (int64_t k = 0; k < in.num_columns; k += 32) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(w[n] + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * in.stride + k);
          acc[r][n] = _mm512_dpbf16_ps(acc[r][n], a, b);
        }
      }
  }
  for (int64_t k = 0; R > 2 && k < in.num_columns; k += 32) {
    __m512bh b[WIDTH];
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) {
      b[n] = (__m512bh)_mm512_loadu_si512(w[n] + k);
      // the same place of the next outputs; the first rows bring it from memory for all
      if (row == 0) _mm_prefetch((const char*)(w[n] + k + AHEAD * in.num_columns), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + r * in.stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < WIDTH; n++) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], a, b[n]);
    }
  }
  __m128 bias = _mm_setzero_ps();
  if (part.bias) {
    const __m128i b = _mm_maskz_loadu_epi16(mask_of(part, output), part.bias + output);
    bias = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(b), 16));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    y[r] = _mm_add_ps(sum_each(acc[r][0], acc[r][1], acc[r][2], acc[r][3]), bias);
}

inline void store(const Input& in, const Part& part, bf16* y, int64_t row, int64_t output,
                  __m128 value) {
  _mm_mask_storeu_epi16(y + row * part.num_outputs + output, mask_of(part, output),
                        (__m128i)_mm_cvtneps_pbh(value));
}

inline __m128 silu_of(__m128 x) {
  return _mm512_castps512_ps128(silu(_mm512_castps128_ps512(x)));
}

template <typename Body>
void for_groups(const Input& in, Body body) {
  for (int64_t row = 0; row < in.num_rows; row += GROUP)
    for_rows((int)std::min<int64_t>(GROUP, in.num_rows - row), [&](auto R) { body(R, row); });
}

}  // namespace

// Layers of one input; their outputs lie one after the other in y, each [num_rows, num_outputs].
extern "C" void linear(const Call* call) {
  const Input in{call->x, call->x_stride, call->num_rows, call->num_columns};
  const Part* parts = call->parts;
  int64_t num_chunks = 0;
  for (int64_t i = 0; i < call->num_parts; i++)
    num_chunks += (parts[i].num_outputs + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)call->num_threads)
  for (int64_t chunk = 0; chunk < num_chunks; chunk++) {
    const Part* part = parts;
    bf16* to = call->y;
    int64_t first = chunk * CHUNK;
    for (; first >= part->num_outputs; part++) {
      first -= (part->num_outputs + CHUNK - 1) / CHUNK * CHUNK;
      to += in.num_rows * part->num_outputs;
    }
    const int64_t stop = std::min(first + CHUNK, part->num_outputs);
    for (int64_t output = first; output < stop; output += WIDTH)
      for_groups(in, [&](auto R, int64_t row) {
        __m128 sums[R];
        multiply_rows<R>(in, *part, row, output, sums);
        for (int r = 0; r < R; r++) store(in, *part, to, row + r, output, sums[r]);
      });
  }
}

// silu(x G^T) * (x U^T): parts are G and U.
extern "C" void gated(const Call* call) {
  const Input in{call->x, call->x_stride, call->num_rows, call->num_columns};
  const Part &gates = call->parts[0], &ups = call->parts[1];
  const int64_t num_outputs = gates.num_outputs;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)call->num_threads)
  for (int64_t first = 0; first < num_outputs; first += CHUNK)
    for (int64_t output = first; output < std::min(first + CHUNK, num_outputs); output += WIDTH)
      for_groups(in, [&](auto R, int64_t row) {
        __m128 gate[R], up[R];
        multiply_rows<R>(in, gates, row, output, gate);
        multiply_rows<R>(in, ups, row, output, up);
        for (int r = 0; r < R; r++)
          store(in, gates, call->y, row + r, output, _mm_mul_ps(silu_of(gate[r]), up[r]));
      });
}
