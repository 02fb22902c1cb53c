// What happens to rows between products, in bfloat16 with float32 inside: embedding and angles,
// RMSNorm, rotation, sums, and the way of keys and values to the cache. The bits of a row depend on
// that row alone. The caller says how many threads are worth their start.

#include <cmath>

#include "tiles.h"

using namespace mnemosyne;

namespace {

inline __m512 widen(const bf16* at) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}

inline void narrow(bf16* to, __m512 x) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
}

struct Lookup {  // as Python lays it out, like the others
  const bf16* table;  // [V, E]
  const int64_t* ids;
  bf16* y;
  int64_t num_rows, width, num_threads;
};

struct Angles {
  const int64_t* positions;
  const double* radians;  // per position
  float *cos, *sin;       // [T, half]
  int64_t num_rows, half, num_threads;
  double gain;
};

struct Norm {
  const bf16* x;
  int64_t x_stride;
  const bf16* w;
  bf16* y;
  int64_t num_rows, width, num_threads;
  double eps;
};

struct Rotation {
  const bf16* x;
  int64_t x_stride;
  const float *cos, *sin;
  bf16* y;
  int64_t num_rows, num_heads, width, num_threads;
};

struct Sum {
  const bf16 *a, *b;
  bf16* y;
  int64_t count, num_threads;
};

struct Write {
  const bf16 *k, *v;  // [T, K, D]
  int64_t k_stride, v_stride;
  bf16 *k_pool, *v_pool;  // [K, S, D]
  int64_t pool_stride;
  const int64_t* slots;
  int64_t num_rows, num_heads, width, num_threads;
};

}  // namespace

// Rows of a table.
extern "C" void look_up(const Lookup* call) {
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++)
    std::memcpy(call->y + row * width, call->table + call->ids[row] * width, width * sizeof(bf16));
}

// Cosine and sine of every row's angles, in double until they are rounded.
extern "C" void angles(const Angles* call) {
  const int64_t half = call->half;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++)
    for (int64_t i = 0; i < half; i++) {
      const double angle = (double)call->positions[row] * call->radians[i];
      call->cos[row * half + i] = (float)(std::cos(angle) * call->gain);
      call->sin[row * half + i] = (float)(std::sin(angle) * call->gain);
    }
}

// y = x / sqrt(mean(x^2) + eps) * w
extern "C" void rms_norm(const Norm* call) {
  const bf16* w = call->w;
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++) {
    const bf16* x = call->x + row * call->x_stride;
    bf16* y = call->y + row * width;
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < width; i += 32)
      for (int h = 0; h < 2; h++) {
        const __m512 v = widen(x + i + 16 * h);
        squares[h] = _mm512_fmadd_ps(v, v, squares[h]);
      }
    const float mean = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1])) / width;
    const __m512 scale = _mm512_set1_ps((float)(1.0 / std::sqrt(mean + call->eps)));
    for (int64_t i = 0; i < width; i += 16)
      narrow(y + i, _mm512_mul_ps(_mm512_mul_ps(widen(x + i), scale), widen(w + i)));
  }
}

// Each pair (i, i + width / 2) of every head turned by its row's angle.
extern "C" void rotate(const Rotation* call) {
  const int64_t width = call->width, half = width / 2;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++) {
    const float *cos = call->cos + row * half, *sin = call->sin + row * half;
    const bf16* from = call->x + row * call->x_stride;
    bf16* y = call->y + row * call->num_heads * width;
    for (int64_t head = 0; head < call->num_heads; head++, from += width, y += width)
      for (int64_t i = 0; i < half; i += 16) {
        const __m512 a = widen(from + i), b = widen(from + half + i);
        const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        narrow(y + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        narrow(y + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
      }
  }
}

// y = a + b, a multiple of 16 elements
extern "C" void add(const Sum* call) {
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t i = 0; i < call->count; i += 16)
    narrow(call->y + i, _mm512_add_ps(widen(call->a + i), widen(call->b + i)));
}

// Keys and values of some rows to their slots.
extern "C" void write(const Write* call) {
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++)
    for (int64_t head = 0; head < call->num_heads; head++) {
      const int64_t to = head * call->pool_stride + call->slots[row] * width;
      const int64_t from = head * width;
      std::memcpy(call->k_pool + to, call->k + row * call->k_stride + from, width * sizeof(bf16));
      std::memcpy(call->v_pool + to, call->v + row * call->v_stride + from, width * sizeof(bf16));
    }
}
