// A device for torch whose memory is the processor's: a tensor "on" it computes as on the CPU, and an operation that
// mixes it with a tensor of the CPU is refused, as a GPU refuses it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>

namespace {

using at::Tensor;
const c10::Device kDevice(c10::DeviceType::PrivateUse1, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {data, data, &c10::free_cpu, kDevice};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};
Memory memory;

// The same memory under another device's name; it lives as long as either storage does.
Tensor renamed(const Tensor& tensor, c10::Device device, c10::DispatchKey key, c10::Allocator* allocator) {
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage),
                    [](void* held) { delete static_cast<c10::Storage*>(held); }, device);
  c10::Storage shared(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true);
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(shared), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}
Tensor as_cpu(const Tensor& tensor) {
  return renamed(tensor, c10::Device(c10::kCPU), c10::DispatchKey::CPU, c10::GetCPUAllocator());
}
Tensor as_ours(const Tensor& tensor) { return renamed(tensor, kDevice, c10::DispatchKey::PrivateUse1, &memory); }
bool ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1; }

// Random numbers: the processor's generator under our name.
struct Draws final : c10::GeneratorImpl {
  at::Generator own;
  explicit Draws(at::Generator generator) : c10::GeneratorImpl(kDevice, kKeys), own(std::move(generator)) {}
  void set_current_seed(uint64_t seed) override { own.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { own.set_offset(offset); }
  uint64_t get_offset() const override { return own.get_offset(); }
  uint64_t current_seed() const override { return own.current_seed(); }
  uint64_t seed() override { return own.seed(); }
  void set_state(const c10::TensorImpl& state) override { own.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return own.unsafeGetGeneratorImpl()->get_state(); }
  Draws* clone_impl() const override { return new Draws(own.clone()); }
};
at::Generator drawn() { return at::make_generator<Draws>(at::detail::createCPUGenerator()); }

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = drawn();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return drawn(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::DataPtr data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

// A GPU takes tensors of the processor as indices, and as single numbers; nowhere else.
bool may_be_cpu(const std::string& name, size_t place) {
  return place > 0 && (name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_" ||
                       name == "aten::_unsafe_index" || name == "aten::_unsafe_index_put");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  const size_t count = schema.arguments().size(), begin = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + begin, stack->end());
  auto changed = [&](const Tensor& tensor, size_t place) -> Tensor {
    if (!tensor.defined()) return tensor;
    if (ours(tensor)) return as_cpu(tensor);
    TORCH_CHECK(tensor.dim() == 0 || may_be_cpu(name, place),
                "Expected all tensors to be on the same device, but found at least two devices, cpu and ", kDevice,
                " (in ", name, ", argument ", place, ")");
    return tensor;
  };
  for (size_t place = 0; place < count; ++place) {
    c10::IValue& value = (*stack)[begin + place];
    if (value.isTensor()) {
      value = changed(value.toTensor(), place);
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) made.push_back(changed(each, place));
      value = made;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> made;
      for (const std::optional<Tensor>& each : value.toOptionalTensorVector()) {
        made.push_back(each ? std::optional<Tensor>(changed(*each, place)) : each);
      }
      value = made;
    } else if (value.isDevice()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto* draws = dynamic_cast<Draws*>(value.toGenerator().unsafeGetGeneratorImpl());
      if (draws) value = draws->own;
    }
  }
  std::vector<c10::IValue> taken(stack->begin() + begin, stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);

  // What was written to shares its memory already, unless it was resized.
  auto written_back = [](const Tensor& original, const Tensor& cpu) {
    if (!ours(original)) return;
    bool moved = cpu.storage().data() != original.storage().data();
    if (moved || cpu.sizes() != original.sizes() || cpu.strides() != original.strides()) {
      Tensor renewed = as_ours(cpu);
      auto* impl = original.unsafeGetTensorImpl();
      if (moved) impl->set_storage_keep_dtype(renewed.storage());
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  };
  for (size_t place = 0; place < count; ++place) {
    const auto* alias = schema.arguments()[place].alias_info();
    if (!alias || !alias->isWrite()) continue;
    if (given[place].isTensor()) {
      written_back(given[place].toTensor(), taken[place].toTensor());
    } else if (given[place].isTensorList()) {
      auto before = given[place].toTensorVector(), after = taken[place].toTensorVector();
      for (size_t each = 0; each < before.size(); ++each) written_back(before[each], after[each]);
    }
  }
  auto returned = [&](const Tensor& made) -> Tensor {
    if (!made.defined() || made.device().type() != c10::kCPU) return made;
    for (size_t place = 0; place < count; ++place) {  // an argument that comes back is itself
      if (taken[place].isTensor() && given[place].isTensor() && taken[place].toTensor().is_same(made)) {
        return given[place].toTensor();
      }
    }
    return as_ours(made);
  };
  const size_t results = schema.returns().size(), first = stack->size() - results;
  for (size_t place = 0; place < results; ++place) {
    c10::IValue& value = (*stack)[first + place];
    if (value.isTensor()) {
      value = returned(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> made;
      for (const Tensor& each : value.toTensorVector()) made.push_back(returned(each));
      value = made;
    }
  }
}

c10::ScalarType type_of(std::optional<c10::ScalarType> asked) {
  return asked ? *asked : c10::typeMetaToScalarType(c10::get_default_dtype());
}
Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, type_of(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type_of(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  Tensor source = ours(from) ? as_cpu(from) : from, target = ours(to) ? as_cpu(to) : to;
  target.copy_(source);
  return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}
Tensor& set_storage(Tensor& self, c10::Storage source) {
  int64_t length = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {length}, {1});
}
Tensor& set_nothing(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true);
  return at::native::set_storage_cpu_(self, std::move(none), 0, {0}, {1});
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_", &set_nothing);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
}
// bitsandbytes has kernels for the CPU, and others in Python, compiled at each shape, for devices that it does not know.
TORCH_LIBRARY_IMPL(bitsandbytes, PrivateUse1, m) {
  for (const char* name :
       {"int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul", "int8_linear_matmul.out",
        "int8_vectorwise_quant", "int8_vectorwise_dequant", "int8_mm_dequant", "int8_double_quant", "dequantize_4bit",
        "dequantize_4bit.out", "quantize_4bit", "gemm_4bit", "dequantize_blockwise", "dequantize_blockwise.out",
        "quantize_blockwise", "gemv_4bit", "gemv_4bit.out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
  }
}
c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::PrivateUse1, new Guard);
const bool registered = [] {
  c10::SetAllocator(c10::DeviceType::PrivateUse1, &memory);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
