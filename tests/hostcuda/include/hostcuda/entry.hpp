// How Python calls a kernel: two C functions for each, its signature and its launch.
#pragma once
#include <string>
#include <type_traits>
#include <utility>

#include "hostcuda/halves.hpp"
#include "hostcuda/scheduler.hpp"

namespace hostcuda {

// NumPy's character and size of a type ("f4"), after a "P" for each pointer to it. A type that is
// neither number nor pointer (a table passed by value) is "V" and its size.
template <class T>
std::string code() {
  using U = std::remove_cv_t<T>;
  if constexpr (std::is_pointer_v<U>) return "P" + code<std::remove_pointer_t<U>>();
  else if constexpr (std::is_void_v<U>) return "V0";
  else if constexpr (std::is_same_v<U, __half>) return "f2";
  else if constexpr (std::is_same_v<U, __nv_bfloat16>) return "E2";
  else {
    const char* kind = std::is_same_v<U, bool>         ? "b"
                       : std::is_floating_point_v<U>   ? "f"
                       : !std::is_integral_v<U>        ? "V"
                       : std::is_signed_v<U>           ? "i"
                                                       : "u";
    return kind + std::to_string(sizeof(U));
  }
}

template <auto kernel>
struct Entry;

template <class... Parameters, void (*kernel)(Parameters...)>
struct Entry<kernel> {
  template <class T>
  static T read(const void* argument) {
    alignas(T) unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, argument, sizeof(T));
    return *reinterpret_cast<T*>(bytes);
  }
  template <std::size_t... I>
  static void unpack(void** arguments, std::index_sequence<I...>) {
    kernel(read<std::remove_cv_t<Parameters>>(arguments[I])...);
  }
  static void call(void** arguments) {
    unpack(arguments, std::index_sequence_for<Parameters...>{});
  }
  static const char* signature() {
    static const std::string text = ((code<Parameters>() + " ") + ... + std::string());
    return text.c_str();
  }
};

// dims: grid and block. Returns what went wrong, or null; valid until this thread's next launch.
HOSTCUDA_QUIET inline const char* launch(void (*call)(void**), void** arguments,
                                         const unsigned* dims, std::size_t shared_bytes,
                                         unsigned order, unsigned workers) {
  static thread_local std::string error;
  Launch launch{};
  launch.grid = {dims[0], dims[1], dims[2]};
  launch.block = {dims[3], dims[4], dims[5]};
  launch.shared_bytes = shared_bytes;
  launch.order = order;
  launch.call = call;
  launch.arguments = arguments;
  run(launch, workers);
  error = launch.error;
  return launch.failed ? error.c_str() : nullptr;
}

}  // namespace hostcuda

#define HOSTCUDA_ENTRY(number, ...)                                                             \
  extern "C" __attribute__((visibility("default"))) const char* signature_##number() {          \
    return hostcuda::Entry<__VA_ARGS__>::signature();                                           \
  }                                                                                             \
  extern "C" __attribute__((visibility("default"))) const char* launch_##number(                \
      void** arguments, const unsigned* dims, std::size_t shared_bytes, unsigned order,         \
      unsigned workers) {                                                                       \
    return hostcuda::launch(hostcuda::Entry<__VA_ARGS__>::call, arguments, dims, shared_bytes,  \
                            order, workers);                                                    \
  }
