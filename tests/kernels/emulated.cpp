// Calls the kernels of libraries for another machine, in that machine's emulator, on memory that
// is shared with the tests.
//
//   emulated DESCRIPTOR SIZE   the memory; prints where it lies here, and then takes lines
//   LIBRARY FUNCTION OFFSET    of which it calls the function with that place in the memory

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {
  const size_t size = std::strtoull(arguments[2], nullptr, 10);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, std::atoi(arguments[1]), 0);
  if (memory == MAP_FAILED) return 1;
  setlinebuf(stdout);
  std::printf("%zu\n", (size_t)memory);
  char path[4096], name[256];
  for (size_t offset; std::scanf("%4095s %255s %zu", path, name, &offset) == 3;) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    void* kernel = library ? dlsym(library, name) : nullptr;
    if (kernel) ((void (*)(void*))kernel)((char*)memory + offset);
    std::puts(kernel ? "done" : dlerror());
  }
}
