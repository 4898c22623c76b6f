// Draws dropout_mask.h's matrix on the CPU.
#pragma once

#include "../dropout_mask.h"

namespace rasa::cpu {

void draw_mask(const MaskArgs& args);

}  // namespace rasa::cpu
