// The types of elements, shared by all op families.
#pragma once

namespace engram {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

}  // namespace engram
