// y = x W^T + b for any number of rows, with the elements widened to float32 on their way.
//
// Every output is a sum over slices of SLICE columns, at fixed places, and a slice a sum in LANES
// lanes, whatever the number of rows: the bits of a row of y depend on that row of x alone.

#include <memory>

#include "vector.h"

using namespace mnemosyne;

namespace {

constexpr int WIDTH = 4;                        // outputs at a time
constexpr int DEPTH = REGISTERS == 16 ? 3 : 6;  // rows at a time: DEPTH x WIDTH sums fit
constexpr int SLICE = 1024;                     // columns whose widened weights stay in L1
constexpr int ROWS = 48;                        // rows whose widened slice stays in L2
constexpr int OUTPUTS = 64;                     // that a thread takes at a time
constexpr int AHEAD = 2 * WIDTH;  // outputs between the one that is computed and the one that is being fetched

struct Part {  // one layer, as the caller's table has it
  const element* w;
  const element* bias;  // or null
  int64_t num_outputs;
};

struct Call {  // as Python lays it out
  const element* x;
  int64_t x_stride;
  const Part* parts;
  int64_t num_parts;
  element* y;
  int64_t num_rows, num_columns, num_threads;
};

struct alignas(64) Scratch {
  float x[ROWS][SLICE];
  float w[WIDTH][SLICE];
  float sum[2][ROWS][OUTPUTS];
};

// A slice of the columns: from where, and how many.
struct Slice {
  int64_t first, length;
};

inline void widen_row(const element* from, float* to, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) store(to + k, widen(from + k));
}

// Sums of R rows with WIDTH outputs over a slice; get(n, k) are LANES weights of output n.
template <int R, typename Weights>
inline void multiply_rows(const float (*x)[SLICE], int64_t length, Weights get, float to[][WIDTH]) {
  vec acc[R][WIDTH];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) acc[r][n] = vec{};
  for (int64_t k = 0; k < length; k += LANES) {
    vec a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) a[r] = load(x[r] + k);
#pragma GCC unroll 8
    for (int n = 0; n < WIDTH; n++) {
      const vec b = get(n, k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][n] = fma(a[r], b, acc[r][n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sum_each(acc[r], to[r]);
}

// Add the sums of a slice to those of up to OUTPUTS outputs, from `first` on.
void add_slice(Scratch& s, int which, const Part& part, int64_t num_columns, int64_t first,
               int count, int num_rows, Slice slice) {
  for (int output = 0; output < count; output += WIDTH) {
    const element* w[WIDTH];
    for (int n = 0; n < WIDTH; n++)
      w[n] = part.w + (first + std::min(output + n, count - 1)) * num_columns + slice.first;
    const auto take = [&](int row, int rows, auto get) {
      for_rows(rows, [&](auto R) {
        if constexpr (R <= DEPTH) {
          float sums[R][WIDTH];
          multiply_rows<R>(s.x + row, slice.length, get, sums);
          for (int r = 0; r < R; r++)
            for (int n = 0; n < std::min(WIDTH, count - output); n++)
              s.sum[which][row + r][output + n] += sums[r][n];
        }
      });
    };
    if (num_rows <= DEPTH) {  // memory is the limit: each weight is used where it is widened
      take(0, num_rows, [&](int n, int64_t k) {
        if (k % (64 / sizeof(element)) == 0) prefetch_line(w[n] + k + AHEAD * num_columns);
        return widen(w[n] + k);
      });
      continue;
    }
    for (int n = 0; n < WIDTH; n++) widen_row(w[n], s.w[n], slice.length);
    for (int row = 0; row < num_rows; row += DEPTH)
      take(row, std::min(DEPTH, num_rows - row), [&](int n, int64_t k) { return load(s.w[n] + k); });
  }
}

// The sums of some rows and outputs of one or two layers, over all columns.
void multiply_block(Scratch& s, const Call& call, const Part* const* parts, int num_parts,
                    int64_t row, int num_rows, int64_t first, int count) {
  for (int i = 0; i < num_parts; i++)
    for (int r = 0; r < num_rows; r++) std::fill_n(s.sum[i][r], OUTPUTS, 0.0f);
  for (int64_t k = 0; k < call.num_columns; k += SLICE) {
    const Slice slice{k, std::min<int64_t>(SLICE, call.num_columns - k)};
    for (int r = 0; r < num_rows; r++)
      widen_row(call.x + (row + r) * call.x_stride + k, s.x[r], slice.length);
    for (int i = 0; i < num_parts; i++)
      add_slice(s, i, *parts[i], call.num_columns, first, count, num_rows, slice);
  }
}

inline vec biased(const float* sums, const Part& part, int64_t output, int count) {
  const vec y = load(sums);
  if (!part.bias) return y;
  return y + (count < LANES ? widen_some(part.bias + output, count) : widen(part.bias + output));
}

// Blocks of rows and outputs of all parts, or of two parts side by side, each to one thread.
template <typename Body>
void for_blocks(const Call* call, const int64_t* num_outputs, int64_t num_parts, Body body) {
  const int64_t num_blocks = (call->num_rows + ROWS - 1) / ROWS;
  int64_t num_chunks = 0;
  for (int64_t i = 0; i < num_parts; i++) num_chunks += (num_outputs[i] + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel num_threads((int)call->num_threads)
  {
    const std::unique_ptr<Scratch> scratch(new Scratch);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_blocks * num_chunks; i++) {
      int64_t part = 0, first = i % num_chunks * OUTPUTS, row = i / num_chunks * ROWS;
      for (; first >= num_outputs[part]; part++)
        first -= (num_outputs[part] + OUTPUTS - 1) / OUTPUTS * OUTPUTS;
      body(*scratch, part, row, (int)std::min<int64_t>(ROWS, call->num_rows - row), first,
           (int)std::min<int64_t>(OUTPUTS, num_outputs[part] - first));
    }
  }
}

template <typename Value>
inline void store_row(element* y, int count, Value value) {
  int n = 0;
  for (; n + LANES <= count; n += LANES) narrow(y + n, value(n, LANES));
  if (n < count) narrow_some(y + n, value(n, count - n), count - n);
}

}  // namespace

// Layers of one input; their outputs lie one after the other in y, each [num_rows, num_outputs].
extern "C" void linear(const Call* call) {
  const std::unique_ptr<int64_t[]> sizes(new int64_t[call->num_parts]);
  for (int64_t i = 0; i < call->num_parts; i++) sizes[i] = call->parts[i].num_outputs;
  for_blocks(call, sizes.get(), call->num_parts,
             [&](Scratch& s, int64_t i, int64_t row, int num_rows, int64_t first, int count) {
               const Part* part = call->parts + i;
               element* y = call->y;
               for (int64_t before = 0; before < i; before++) y += call->num_rows * sizes[before];
               multiply_block(s, *call, &part, 1, row, num_rows, first, count);
               for (int r = 0; r < num_rows; r++)
                 store_row(y + (row + r) * part->num_outputs + first, count, [&](int n, int lanes) {
                   return biased(s.sum[0][r] + n, *part, first + n, lanes);
                 });
             });
}

// silu(x G^T) * (x U^T): parts are G and U.
extern "C" void gated(const Call* call) {
  const Part *gate = call->parts, *up = call->parts + 1, *parts[] = {gate, up};
  for_blocks(call, &gate->num_outputs, 1,
             [&](Scratch& s, int64_t, int64_t row, int num_rows, int64_t first, int count) {
               multiply_block(s, *call, parts, 2, row, num_rows, first, count);
               for (int r = 0; r < num_rows; r++)
                 store_row(call->y + (row + r) * gate->num_outputs + first, count,
                           [&](int n, int lanes) {
                             return silu(biased(s.sum[0][r] + n, *gate, first + n, lanes)) *
                                    biased(s.sum[1][r] + n, *up, first + n, lanes);
                           });
             });
}
