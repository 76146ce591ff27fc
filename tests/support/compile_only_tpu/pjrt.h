// The part of the PJRT C API that the compile-only TPU speaks, declared by ourselves.
//
// A plug-in hands out one table of functions. Every function takes a single struct and
// returns an error, or null. The struct begins with its own size, so that a later
// version can add fields at its end; then come what the caller passes in and what it
// gets back ("out"). Pointers that are returned belong to the object they describe.
//
// The order of fields and the positions in the table are fixed by the API; the names
// here are free. Only what is used is declared. Fields after the last one that is used
// are left out: the struct's size is checked to be at least what is declared.

#ifndef COMPILE_ONLY_TPU_PJRT_H_
#define COMPILE_ONLY_TPU_PJRT_H_

#include <cstddef>
#include <cstdint>

namespace pjrt {

// Objects of libtpu, which are never looked into.
struct Topology;
struct DeviceDescription;
struct Executable;
struct Layout;
// Objects of the compile-only TPU.
struct Error;
struct Event;
struct Client;
struct Device;
struct Memory;
struct LoadedExecutable;
struct Buffer;

// How every struct of arguments begins.
struct Args {
  size_t struct_size;
  void* extensions;
};

using Function = Error* (*)(void* args);

enum ErrorCode : int {
  kInvalidArgument = 3,
  kNotFound = 5,
  kFailedPrecondition = 9,
  kUnimplemented = 12,
  kInternal = 13,
};

// Where each function stands in the table.
enum Position : int {
  kErrorDestroy = 0,
  kErrorMessage = 1,
  kErrorGetCode = 2,
  kPluginInitialize = 3,
  kPluginAttributes = 4,
  kEventDestroy = 5,
  kEventIsReady = 6,
  kEventError = 7,
  kEventAwait = 8,
  kEventOnReady = 9,
  kClientCreate = 10,
  kClientDestroy = 11,
  kClientPlatformName = 12,
  kClientProcessIndex = 13,
  kClientPlatformVersion = 14,
  kClientDevices = 15,
  kClientAddressableDevices = 16,
  kClientLookupDevice = 17,
  kClientLookupAddressableDevice = 18,
  kClientAddressableMemories = 19,
  kClientCompile = 20,
  kClientDefaultDeviceAssignment = 21,
  kClientBufferFromHostBuffer = 22,
  kDeviceDescriptionId = 23,
  kDeviceDescriptionToString = 28,
  kDeviceGetDescription = 29,
  kDeviceIsAddressable = 30,
  kDeviceLocalHardwareId = 31,
  kDeviceAddressableMemories = 32,
  kDeviceDefaultMemory = 33,
  kDeviceMemoryStats = 34,
  kMemoryId = 35,
  kMemoryKind = 36,
  kMemoryDebugString = 37,
  kMemoryToString = 38,
  kMemoryAddressableByDevices = 39,
  kExecutableDestroy = 40,
  kExecutableName = 41,
  kExecutableOptimizedProgram = 48,
  kExecutableSerialize = 49,
  kLoadedExecutableDestroy = 50,
  kLoadedExecutableGetExecutable = 51,
  kLoadedExecutableAddressableDevices = 52,
  kLoadedExecutableDelete = 53,
  kLoadedExecutableIsDeleted = 54,
  kLoadedExecutableExecute = 55,
  kExecutableDeserializeAndLoad = 56,
  kLoadedExecutableFingerprint = 57,
  kBufferDestroy = 58,
  kBufferElementType = 59,
  kBufferDimensions = 60,
  kBufferUnpaddedDimensions = 61,
  kBufferDynamicDimensionIndices = 62,
  kBufferGetMemoryLayout = 63,
  kBufferOnDeviceSizeInBytes = 64,
  kBufferDevice = 65,
  kBufferMemory = 66,
  kBufferDelete = 67,
  kBufferIsDeleted = 68,
  kBufferToHostBuffer = 70,
  kBufferIsOnCpu = 71,
  kBufferReadyEvent = 72,
  kTopologyCreate = 82,
  kTopologyGetDeviceDescriptions = 86,
  kTopologyAttributes = 88,
  kCompile = 89,
  kExecutableOutputElementTypes = 90,
  kExecutableOutputDimensions = 91,
  kExecutableFingerprint = 94,
  kClientTopology = 95,
  kExecutableMemoryStats = 96,
  kMemoryKindId = 97,
  kExecuteContextCreate = 98,
  kExecuteContextDestroy = 99,
  kTopologyDeserialize = 114,
  kLoadedExecutableGetDeviceAssignment = 117,
  kNumFunctions = 118,
};

// The version that these declarations describe. It is what callers are told, so that
// they use no function and no field which came later.
constexpr int kMajorVersion = 0;
constexpr int kMinorVersion = 81;

enum ExtensionType : int {
  kLayoutsExtension = 4,
  kTpuTopologyExtension = 16,
};

// Extensions are a list, each with a table of functions of its own.
struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

struct LayoutsExtension : Extension {
  Function destroy;
  Function serialize;
  Function client_default_layout;
  Function buffer_layout;
  Function topology_default_layout;
  Function executable_output_layouts;
};

struct Version : Args {
  int major;
  int minor;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  Function functions[kNumFunctions];
};

// ---- Errors and events -------------------------------------------------------------

struct ErrorDestroyArgs : Args {
  Error* error;
};

struct ErrorMessageArgs : Args {
  const Error* error;
  const char* message;  // out
  size_t message_size;  // out
};

struct ErrorGetCodeArgs : Args {
  const Error* error;
  ErrorCode code;  // out
};

struct EventArgs : Args {  // destroy, error, await
  Event* event;
};

struct EventIsReadyArgs : Args {
  Event* event;
  bool is_ready;  // out
};

struct EventOnReadyArgs : Args {
  Event* event;
  void (*callback)(Error* error, void* user_arg);
  void* user_arg;
};

// ---- Topology ----------------------------------------------------------------------

enum NamedValueType : int { kInt64List = 2 };

struct NamedValue : Args {
  const char* name;
  size_t name_size;
  NamedValueType type;
  const int64_t* int64_list;  // a union in the API
  size_t value_size;
};

struct TopologyCreateArgs : Args {
  const char* name;
  size_t name_size;
  const NamedValue* options;
  size_t num_options;
  Topology* topology;  // out
};

struct TopologyGetDeviceDescriptionsArgs : Args {
  const Topology* topology;
  DeviceDescription* const* descriptions;  // out
  size_t num_descriptions;                 // out
};

struct DeviceDescriptionIdArgs : Args {
  DeviceDescription* description;
  int id;  // out
};

// ---- Client, devices and memories --------------------------------------------------

struct ClientCreateArgs : Args {
  const NamedValue* options;
  size_t num_options;
  void* key_value_callbacks[4];
  Client* client;  // out
};

struct ClientArgs : Args {  // destroy
  Client* client;
};

struct ClientStringArgs : Args {  // platform name and version
  Client* client;
  const char* text;  // out
  size_t text_size;  // out
};

struct ClientProcessIndexArgs : Args {
  Client* client;
  int process_index;  // out
};

struct ClientDevicesArgs : Args {  // all and addressable ones
  Client* client;
  Device* const* devices;  // out
  size_t num_devices;      // out
};

struct ClientLookupDeviceArgs : Args {  // by id and by local hardware id
  Client* client;
  int id;
  Device* device;  // out
};

struct ClientMemoriesArgs : Args {
  Client* client;
  Memory* const* memories;  // out
  size_t num_memories;      // out
};

struct ClientTopologyArgs : Args {
  Client* client;
  Topology* topology;  // out
};

struct ClientDefaultDeviceAssignmentArgs : Args {
  Client* client;
  int num_replicas;
  int num_partitions;
  size_t size;
  int* device_ids;  // filled in
};

struct DeviceGetDescriptionArgs : Args {
  Device* device;
  DeviceDescription* description;  // out
};

struct DeviceIsAddressableArgs : Args {
  Device* device;
  bool is_addressable;  // out
};

struct DeviceLocalHardwareIdArgs : Args {
  Device* device;
  int id;  // out
};

struct DeviceMemoriesArgs : Args {
  Device* device;
  Memory* const* memories;  // out
  size_t num_memories;      // out
};

struct DeviceDefaultMemoryArgs : Args {
  Device* device;
  Memory* memory;  // out
};

struct OptionalBytes {
  int64_t value;
  bool is_set;
};

struct DeviceMemoryStatsArgs : Args {
  Device* device;
  // out:
  int64_t bytes_in_use;
  OptionalBytes peak_bytes_in_use;
  OptionalBytes num_allocations;
  OptionalBytes largest_allocation;
  OptionalBytes bytes_limit;
  OptionalBytes reservations_and_pools[6];
};

struct MemoryIdArgs : Args {  // id and number of its kind
  Memory* memory;
  int id;  // out
};

struct MemoryStringArgs : Args {  // kind and descriptions
  Memory* memory;
  const char* text;  // out
  size_t text_size;  // out
};

struct MemoryDevicesArgs : Args {
  Memory* memory;
  Device* const* devices;  // out
  size_t num_devices;      // out
};

// ---- Compilation -------------------------------------------------------------------

struct Program : Args {
  char* code;  // null to ask for code_size alone
  size_t code_size;
  const char* format;
  size_t format_size;
};

struct CompileArgs : Args {
  const Topology* topology;
  const Program* program;
  const char* options;
  size_t options_size;
  Client* client;
  Executable* executable;  // out
};

struct ClientCompileArgs : Args {
  Client* client;
  const Program* program;
  const char* options;
  size_t options_size;
  LoadedExecutable* executable;  // out
};

struct ExecutableArgs : Args {  // destroy
  Executable* executable;
};

struct ExecutableOptimizedProgramArgs : Args {
  Executable* executable;
  Program* program;  // filled in
};

struct ExecutableOutputTypesArgs : Args {
  Executable* executable;
  const int* types;    // out
  size_t num_outputs;  // out
};

struct ExecutableOutputDimensionsArgs : Args {
  Executable* executable;
  size_t num_outputs;            // out
  const int64_t* dimensions;     // out, of all outputs, one after the other
  const size_t* num_dimensions;  // out, of each
};

struct ExecutableSerializeArgs : Args {
  const Executable* executable;
  const char* bytes;           // out
  size_t bytes_size;           // out
  void* owner;                 // out
  void (*deleter)(void* owner);  // out
};

struct ExecutableDeserializeArgs : Args {
  Client* client;
  const char* bytes;
  size_t bytes_size;
  LoadedExecutable* executable;  // out
};

struct LoadedExecutableArgs : Args {  // destroy and delete
  LoadedExecutable* executable;
};

struct LoadedExecutableGetExecutableArgs : Args {
  LoadedExecutable* loaded;
  Executable* executable;  // out
};

struct LoadedExecutableDevicesArgs : Args {
  LoadedExecutable* executable;
  Device* const* devices;  // out
  size_t num_devices;      // out
};

struct LoadedExecutableIsDeletedArgs : Args {
  LoadedExecutable* executable;
  bool is_deleted;  // out
};

struct LoadedExecutableFingerprintArgs : Args {
  LoadedExecutable* executable;
  const char* text;  // out
  size_t text_size;  // out
};

struct LoadedExecutableGetDeviceAssignmentArgs : Args {
  LoadedExecutable* executable;
  const char* bytes;             // out
  size_t bytes_size;             // out
  void* owner;                   // out
  void (*deleter)(void* owner);  // out
};

struct ExecuteOptions : Args {
  void* send_callbacks;
  void* recv_callbacks;
  size_t num_send;
  size_t num_recv;
  int launch_id;
  const int64_t* not_donatable;  // indices of arguments
  size_t num_not_donatable;
};

struct ExecuteArgs : Args {
  LoadedExecutable* executable;
  ExecuteOptions* options;
  Buffer* const* const* arguments;  // of each device
  size_t num_devices;
  size_t num_arguments;
  Buffer** const* results;  // of each device, filled in
  Event** done;             // of each device, filled in; or null
  Device* device;           // or null
};

// ---- Buffers -----------------------------------------------------------------------

struct MemoryLayout : Args {
  // Of the kind that says the order of dimensions, and tiles; a union in the API.
  struct Tiled : Args {
    const int64_t* minor_to_major;
    size_t minor_to_major_size;
    const int64_t* tile_dimensions;
    const size_t* tile_sizes;
    size_t num_tiles;
  } tiled;
  int kind;  // 0: tiled
};

struct ClientBufferFromHostArgs : Args {
  Client* client;
  const void* data;
  int type;
  const int64_t* dimensions;
  size_t num_dimensions;
  const int64_t* byte_strides;
  size_t num_byte_strides;  // 0: row-major
  int semantics;
  Device* device;
  Memory* memory;  // or null
  MemoryLayout* layout;
  Event* done_with_host_buffer;  // out
  Buffer* buffer;                // out
};

struct BufferArgs : Args {  // destroy and delete
  Buffer* buffer;
};

struct BufferElementTypeArgs : Args {
  Buffer* buffer;
  int type;  // out
};

struct BufferDimensionsArgs : Args {  // also those without padding
  Buffer* buffer;
  const int64_t* dimensions;  // out
  size_t num_dimensions;      // out
};

struct BufferDynamicDimensionsArgs : Args {
  Buffer* buffer;
  const size_t* indices;  // out
  size_t num_indices;     // out
};

struct BufferGetMemoryLayoutArgs : Args {
  Buffer* buffer;
  MemoryLayout layout;  // out
};

struct BufferSizeArgs : Args {
  Buffer* buffer;
  size_t size_in_bytes;  // out
};

struct BufferDeviceArgs : Args {
  Buffer* buffer;
  Device* device;  // out
};

struct BufferMemoryArgs : Args {
  Buffer* buffer;
  Memory* memory;  // out
};

struct BufferBoolArgs : Args {  // is it deleted, is it on the CPU
  Buffer* buffer;
  bool value;  // out
};

struct BufferReadyEventArgs : Args {
  Buffer* buffer;
  Event* event;  // out
};

struct BufferToHostArgs : Args {
  Buffer* buffer;
  MemoryLayout* layout;
  void* data;    // null to ask for the size alone
  size_t size;   // out, if data is null
  Event* event;  // out
};

// ---- Extensions --------------------------------------------------------------------

struct DefaultLayoutArgs : Args {
  void* owner;  // a client or a topology
  int type;
  const int64_t* dimensions;
  size_t num_dimensions;
  Layout* layout;  // out
};

struct BufferLayoutArgs : Args {
  Buffer* buffer;
  Layout* layout;  // out
};

}  // namespace pjrt

#endif  // COMPILE_ONLY_TPU_PJRT_H_
