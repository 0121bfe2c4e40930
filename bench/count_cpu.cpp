// PyTorch's allocator of a CPU, with what it has given out counted: there is no torch.cpu.max_memory_allocated.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <malloc.h>
#include <torch/extension.h>

#include <atomic>

namespace {

std::atomic<int64_t> held{0}, most{0};

void take(void* memory) {
  if (memory == nullptr) return;
  int64_t now = held += malloc_usable_size(memory), before = most;
  while (now > before && !most.compare_exchange_weak(before, now)) {
  }
}

void give_back(void* memory) {
  if (memory == nullptr) return;
  held -= malloc_usable_size(memory);
  c10::free_cpu(memory);
}

struct Counting final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    take(memory);
    return {memory, memory, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
} counting;

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("install", [] { c10::SetCPUAllocator(&counting, 255); });
  module.def("held", [] { return held.load(); });
  module.def("most", [] { return most.load(); });
  module.def("reset", [] { most = held.load(); });
}
