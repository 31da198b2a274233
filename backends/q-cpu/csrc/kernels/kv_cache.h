// Writing to the paged cache, and copying its blocks; a part of the attention family.

#pragma once

#include "attention.h"
#include "level.h"

namespace q_cpu::Q_CPU_LEVEL {

void write_kv(const WriteKv& a, int64_t first, int64_t last);
void copy_blocks(const CopyBlocks& a, int64_t first, int64_t last);

}  // namespace q_cpu::Q_CPU_LEVEL
