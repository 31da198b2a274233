// Where a kernel source goes when it is compiled for one ISA level.
//
// Everything that is not exported through the level's table lies in an anonymous namespace, and kernel sources include C headers
// only: an inline function or a std template compiled with AVX flags could be the copy that the linker keeps for the baseline.

#pragma once

#ifndef Q_CPU_LEVEL
#error "kernel sources are compiled once an ISA level, with -DQ_CPU_LEVEL=<level>"
#endif
