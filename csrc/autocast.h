// What autocast makes of the ops' tensors.
#pragma once

#include <ATen/autocast_mode.h>

namespace rasa {

template <c10::DeviceType device>
struct AutocastTo {
  static at::Tensor cast(const at::Tensor& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  }
  // A half adapter follows the autocast dtype; a float one is taken as it is, in registers.
  static at::Tensor cast_adapter(const at::Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ? t : cast(t);
  }
};

}  // namespace rasa
