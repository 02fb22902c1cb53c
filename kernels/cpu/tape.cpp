// Calls of kernels one after another, without a way back to Python in between.

#include <cstdint>

struct Call {
  void (*kernel)(const void* arguments);
  const void* arguments;
};

extern "C" void run(const Call* calls, int64_t num_calls) {
  for (int64_t i = 0; i < num_calls; i++) calls[i].kernel(calls[i].arguments);
}
