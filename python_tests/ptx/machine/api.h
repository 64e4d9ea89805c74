// What Python (by ctypes) and the CUDA runtime of cudart.cpp call. A function that can fail says so by its
// result, and ptx_error() says why. One thread at a time.
#pragma once

#include <cstdint>

extern "C" {

// The reason of the last failure; of a fault in a kernel with its name, PTX line, source line, block, thread.
const char* ptx_error();

// -- Device and options -------------------------------------------------------------------------------------

// Makes "A100", "H100", "B200", "RTX 4090" or "RTX 5090" the device. `multiprocessors` other than 0 replaces
// the device's own, so that kernels that fill the device stay small. Returns 0, or 1 for an unknown name.
int ptx_device(const char* name, int multiprocessors);
// Of the device: "multiprocessors", "architecture" (80, 90, ...), "shared_optin" (bytes a block can ask for),
// "shared_multiprocessor", "threads_multiprocessor". Returns -1 for an unknown name.
int64_t ptx_device_attribute(const char* name);
// Sets an option; returns 1 for an unknown name. In brackets what holds from the start:
//   seed [1]         of all random choices: order of warps and blocks, who wins, rounding
//   quantum [64]     instructions of a warp at most before another warp's turn
//   divergence [0.05] how often not the hindmost lanes of a divided warp go first
//   resident [3]     blocks of an ordinary launch that run at a time
//   races [1]        unordered accesses to one byte are faults
//   definedness [1]  uses of undefined registers and of memory that nobody wrote are faults
//   conflicts [1]    lanes of one store that write different values to one byte are a fault; 0: one wins
//   fusion [0]       share of the products and sums that the assembler may fuse that are fused, 0 to 1
//   approximation [0] 1: approximate instructions are off by up to what the ISA allows
//   sums [0]         1: sums of tensor cores in random order, with a random rounding of each addition
//   limit [2e10]     instructions of warps that a launch may take
//   partition [0]    multiprocessors that launches may use (a green context), which the device does not tell;
//                    0: all
int ptx_option(const char* name, double value);

// -- Memory -------------------------------------------------------------------------------------------------
// A kernel sees a tensor at a device address of its own, 256 GiB from every other: an address that leaves its
// tensor meets nothing, whatever lies beside it in the host's memory. Views that overlap may be mapped each
// for itself; races and definedness are of the bytes of the host.

// Gives bytes of the host to the device; returns the device address, the same as `host` modulo 256, or 0. A
// map of no bytes has an address too, and every access to it is a fault.
uint64_t ptx_map(const void* host, uint64_t bytes, const char* name);
// Takes the map back that begins at the device address; its address is never given again.
void ptx_unmap(uint64_t address);
// The byte of the host at a device address with `bytes` behind it in one map, or null.
void* ptx_host(uint64_t address, uint64_t bytes);
// Nobody has written these bytes of the host (torch.empty): reads of them by a kernel are faults.
void ptx_undefine(const void* host, uint64_t bytes);
// The host has written these bytes.
void ptx_define(const void* host, uint64_t bytes);
// The offset of the first byte that is still undefined, or -1.
int64_t ptx_first_undefined(const void* host, uint64_t bytes);
// Forgets which bytes are undefined, so that the host can use their memory for other things.
void ptx_define_all();

// -- Modules and launches -----------------------------------------------------------------------------------

// Parses the PTX of a module, which stays to the end; null if a line of it is not known. `may_fuse`: its
// assembler may make one instruction of a product and a sum that have no rounding modifier (ptxas without
// --fmad=false).
void* ptx_load(const char* text, int may_fuse);
// Writes offset and size of each parameter of a kernel, then -1; at most `capacity` numbers. Returns the
// number of parameters, or -1.
int ptx_parameters(void* module, const char* kernel, int* out, int capacity);
// Bytes of static shared memory of a kernel, or -1.
int ptx_static_shared(void* module, const char* kernel);
// Whether the device runs the architecture that a module's code is for.
int ptx_serves(void* module);
// Blocks of a kernel that one multiprocessor holds by threads and shared memory (not by registers, which only
// the assembler knows), or -1.
int ptx_occupancy(void* module, const char* kernel, int threads, int64_t dynamic_shared);
// Runs a kernel to its end; returns 0, or 1 after a fault or a refusal. `params` as in the device's parameter
// memory. `shared_allowed`: what shared memory, static and dynamic, the host has asked for.
int ptx_launch(void* module, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
               int64_t dynamic_shared, const void* params, int cooperative, int64_t shared_allowed);
// What was run since the last call: launches, instructions of warps, instructions of lanes, stores of a value
// that another thread had just stored, conflicts that were let pass.
void ptx_statistics(int64_t out[5]);

// -- Coverage and faults to inject
// --------------------------------------------------------------------------- Kernels are numbered as they
// were loaded, 0 to ptx_kernels() - 1, instructions from 0 in each.

int ptx_kernels();
const char* ptx_kernel_name(int kernel);
// A line an instruction: PTX line, tab, how often warps ran it, tab, source line or nothing, tab, its text.
const char* ptx_listing(int kernel);
// Sets all counts of runs to 0.
void ptx_reset_counts();
// Puts `opcode` (of the same operands; "nop" for none; "" to keep it) and an address that is `shift` bytes
// further in place of an instruction's. Returns 0, or 1 where the opcode does not fit.
int ptx_patch(int kernel, int instruction, const char* opcode, int64_t shift);
// Puts all instructions back.
void ptx_restore();

}  // extern "C"
