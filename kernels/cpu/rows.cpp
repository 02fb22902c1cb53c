// Operations on rows between products, with float32 inside: embedding and angles, RMSNorm,
// rotation, sums, and writes of keys and values to the cache. The bits of a row depend on that row
// alone. The caller says how many threads are worth starting.

#include "vector.h"

using namespace mnemosyne;

namespace {

struct Lookup {  // as Python lays it out, like the others
  const element* table;  // [V, E]
  const int64_t* ids;
  element* y;
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
  const element* x;
  int64_t x_stride;
  const element* w;
  element* y;
  int64_t num_rows, width, num_threads;
  double eps, offset;
};

struct Rotation {
  const element* x;
  int64_t x_stride;
  const float *cos, *sin;
  element* y;
  int64_t num_rows, num_heads, width, num_threads;
};

struct Sum {
  const element *a, *b;
  element* y;
  int64_t count, num_threads;
};

struct Write {
  const element *k, *v;  // [T, K, D]
  int64_t k_stride, v_stride;
  element *k_pool, *v_pool;  // [K, S, D]
  int64_t pool_stride;
  const int64_t* slots;
  int64_t num_rows, num_heads, width, num_threads;
};

struct Route {
  const element* x;
  int64_t x_stride;
  const element* w;  // [X, width]
  float* y;          // [T, X]
  int64_t num_rows, width, num_experts, num_threads;
};

}  // namespace

// Rows of a table.
extern "C" void look_up(const Lookup* call) {
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++)
    std::memcpy(call->y + row * width, call->table + call->ids[row] * width, width * sizeof(element));
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

// y = x / sqrt(mean(x^2) + eps) * (w + offset)
extern "C" void rms_norm(const Norm* call) {
  const element* w = call->w;
  const vec offset = all((float)call->offset);
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++) {
    const element* x = call->x + row * call->x_stride;
    element* y = call->y + row * width;
    vec squares[2] = {};
    for (int64_t i = 0; i < width; i += 2 * LANES)
      for (int h = 0; h < 2; h++) {
        const vec v = widen(x + i + LANES * h);
        squares[h] = fma(v, v, squares[h]);
      }
    const float mean = sum_of(squares[0] + squares[1]) / width;
    const vec scale = all((float)(1.0 / std::sqrt(mean + call->eps)));
    for (int64_t i = 0; i < width; i += LANES)
      narrow(y + i, widen(x + i) * scale * (widen(w + i) + offset));
  }
}

// Each pair (i, i + width / 2) of every head turned by its row's angle.
extern "C" void rotate(const Rotation* call) {
  const int64_t width = call->width, half = width / 2;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++) {
    const float *cos = call->cos + row * half, *sin = call->sin + row * half;
    const element* from = call->x + row * call->x_stride;
    element* y = call->y + row * call->num_heads * width;
    for (int64_t head = 0; head < call->num_heads; head++, from += width, y += width)
      for (int64_t i = 0; i < half; i += LANES) {
        const vec a = widen(from + i), b = widen(from + half + i);
        const vec c = load(cos + i), s = load(sin + i);
        narrow(y + i, fma(a, c, -(b * s)));
        narrow(y + half + i, fma(b, c, a * s));
      }
  }
}

// y = a + b, a multiple of LANES elements
extern "C" void add(const Sum* call) {
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t i = 0; i < call->count; i += LANES)
    narrow(call->y + i, widen(call->a + i) + widen(call->b + i));
}

// Keys and values of some rows to their slots.
extern "C" void write(const Write* call) {
  const int64_t width = call->width;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++)
    for (int64_t head = 0; head < call->num_heads; head++) {
      const int64_t to = head * call->pool_stride + call->slots[row] * width;
      const int64_t from = head * width;
      std::memcpy(call->k_pool + to, call->k + row * call->k_stride + from, width * sizeof(element));
      std::memcpy(call->v_pool + to, call->v + row * call->v_stride + from, width * sizeof(element));
    }
}

// y = x w^T in float, each sum in an order of its own row: neither the rows beside a row nor
// their number change its bits, which may decide a choice among near equals.
extern "C" void route(const Route* call) {
  const int64_t width = call->width, num_experts = call->num_experts;
#pragma omp parallel for num_threads((int)call->num_threads)
  for (int64_t row = 0; row < call->num_rows; row++) {
    const element* x = call->x + row * call->x_stride;
    for (int64_t expert = 0; expert < num_experts; expert++) {
      const element* w = call->w + expert * width;
      vec sums[2] = {};
      for (int64_t i = 0; i < width; i += 2 * LANES)
        for (int h = 0; h < 2; h++)
          sums[h] = fma(widen(x + i + LANES * h), widen(w + i + LANES * h), sums[h]);
      call->y[row * num_experts + expert] = sum_of(sums[0] + sums[1]);
    }
  }
}
