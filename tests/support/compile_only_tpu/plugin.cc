// A TPU that compiles and does not compute: a PJRT plug-in around libtpu's compiler.
//
// libtpu compiles for a topology without a TPU, but its client wants one. Here libtpu
// keeps the compiler, and client, devices, buffers and execution are objects on the
// host. An execution returns zeros, takes donated arguments away, as a device does, and
// refuses arguments that were taken away before. Everything is recorded (recorder.h).
//
// Environment:
//   COMPILE_ONLY_TPU_LIBTPU    libtpu.so
//   COMPILE_ONLY_TPU_TOPOLOGY  such as v6e:1x1x1
//   COMPILE_ONLY_TPU_DUMP      an empty directory for the record

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "hlo.h"
#include "pjrt.h"
#include "recorder.h"

namespace pjrt {

struct Error {
  ErrorCode code;
  std::string message;
};

// Nothing is ever awaited: what an event reports has already happened.
struct Event {};

struct Memory {
  int id;
  int kind_id;
  std::string kind;
  Device* device;
};

struct Device {
  int id;
  DeviceDescription* description;
  Topology* topology;
  std::vector<Memory*> memories = {};  // the default one comes first
  int64_t bytes_in_use = 0;
  int64_t peak_bytes_in_use = 0;
};

}  // namespace pjrt

namespace {

using namespace pjrt;

// Memory of a device, for those who ask: nothing runs out of it.
constexpr int64_t kDeviceBytes = int64_t{32} << 30;
// Larger buffers keep no values, and read as zeros.
constexpr size_t kLargestKeptBytes = size_t{16} << 20;

// ---- Errors ------------------------------------------------------------------------

struct Failure {
  ErrorCode code;
  std::string message;
};

// Guards all that changes after the client was created, but for the record.
std::mutex state_mutex;
// libtpu's functions that are passed through return errors of its own.
std::set<const Error*> own_errors;

Error* new_error(ErrorCode code, const std::string& message) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  Error* error = new Error{code, "compile-only TPU: " + message};
  own_errors.insert(error);
  return error;
}

bool is_own(const Error* error) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  return own_errors.count(error) > 0;
}

// ---- Functions of the table --------------------------------------------------------

// Turns `void implementation(Args&)`, which throws, into a function of the table.
template <auto implementation>
struct Entry;

template <typename ArgsType, void (*implementation)(ArgsType&)>
struct Entry<implementation> {
  static Error* call(void* untyped) {
    auto& args = *static_cast<ArgsType*>(untyped);
    try {
      // Callers count to the end of the last field, and not to that of the struct.
      if (args.struct_size + alignof(ArgsType) <= sizeof(ArgsType)) {
        throw Failure{kUnimplemented,
                      "a caller of an older version of the PJRT C API: expected " +
                          std::to_string(sizeof(ArgsType)) +
                          " bytes of arguments, got " +
                          std::to_string(args.struct_size)};
      }
      implementation(args);
      return nullptr;
    } catch (const Failure& failure) {
      return new_error(failure.code, failure.message);
    } catch (const std::exception& failure) {
      return new_error(kInternal, failure.what());
    }
  }
};

template <int position>
Error* not_there(void*) {
  return new_error(kUnimplemented, "function " + std::to_string(position) +
                                       " of the PJRT C API (pjrt.h) is not there");
}

template <typename ArgsType>
void succeed(ArgsType&) {}

// ---- libtpu ------------------------------------------------------------------------

std::string required_environment(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') {
    throw std::runtime_error(std::string(name) + " is not set");
  }
  return value;
}

class Libtpu {
 public:
  // Loads it, and checks that it has all that is declared in pjrt.h.
  void load(const std::string& path) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(dlerror());
    const auto get_api =
        reinterpret_cast<const Api* (*)()>(dlsym(library, "GetPjrtApi"));
    if (get_api == nullptr) throw std::runtime_error(path + " has no GetPjrtApi");
    api_ = get_api();
    const Version& version = api_->version;
    if (version.major != kMajorVersion || version.minor < kMinorVersion ||
        api_->struct_size < sizeof(Api)) {
      throw std::runtime_error(
          "PJRT C API of libtpu: expected version " + std::to_string(kMajorVersion) +
          "." + std::to_string(kMinorVersion) + " or a later minor one with at least " +
          std::to_string(sizeof(Api)) + " bytes, got " +
          std::to_string(version.major) + "." + std::to_string(version.minor) +
          " with " + std::to_string(api_->struct_size));
    }
  }

  Function function(Position position) const { return api_->functions[position]; }

  Extension* extensions() const { return api_->extensions; }

  template <typename ArgsType>
  void call(Position position, ArgsType& args) const {
    call(function(position), args);
  }

  // Calls a function of libtpu; throws what it returns.
  template <typename ArgsType>
  void call(Function function, ArgsType& args) const {
    args.struct_size = sizeof args;
    Error* error = function(&args);
    if (error == nullptr) return;
    ErrorMessageArgs message{};
    message.struct_size = sizeof message;
    message.error = error;
    this->function(kErrorMessage)(&message);
    ErrorGetCodeArgs code{};
    code.struct_size = sizeof code;
    code.error = error;
    this->function(kErrorGetCode)(&code);
    const Failure failure{code.code, {message.message, message.message_size}};
    ErrorDestroyArgs destroy{};
    destroy.struct_size = sizeof destroy;
    destroy.error = error;
    this->function(kErrorDestroy)(&destroy);
    throw failure;
  }

 private:
  const Api* api_ = nullptr;
};

Libtpu libtpu;
recorder::Recorder record;

Error* error_destroy(void* untyped) {
  auto* args = static_cast<ErrorDestroyArgs*>(untyped);
  if (args->error != nullptr && !is_own(args->error)) {
    return libtpu.function(kErrorDestroy)(untyped);
  }
  const std::lock_guard<std::mutex> lock(state_mutex);
  own_errors.erase(args->error);
  delete args->error;
  return nullptr;
}

Error* error_message(void* untyped) {
  auto* args = static_cast<ErrorMessageArgs*>(untyped);
  if (!is_own(args->error)) return libtpu.function(kErrorMessage)(untyped);
  args->message = args->error->message.data();
  args->message_size = args->error->message.size();
  return nullptr;
}

Error* error_get_code(void* untyped) {
  auto* args = static_cast<ErrorGetCodeArgs*>(untyped);
  if (!is_own(args->error)) return libtpu.function(kErrorGetCode)(untyped);
  args->code = args->error->code;
  return nullptr;
}

// ---- Element types -----------------------------------------------------------------

struct ElementType {
  std::string_view name;  // as HLO has it
  int bits;
};

// In the order of the API's enumeration. Types of less than a byte take one each.
constexpr std::array<ElementType, 30> kElementTypes = {{
    {"invalid", 0},      {"pred", 8},       {"s8", 8},          {"s16", 16},
    {"s32", 32},         {"s64", 64},       {"u8", 8},          {"u16", 16},
    {"u32", 32},         {"u64", 64},       {"f16", 16},        {"f32", 32},
    {"f64", 64},         {"bf16", 16},      {"c64", 64},        {"c128", 128},
    {"f8e5m2", 8},       {"f8e4m3fn", 8},   {"f8e4m3b11fnuz", 8},
    {"f8e5m2fnuz", 8},   {"f8e4m3fnuz", 8}, {"s4", 8},          {"u4", 8},
    {"token", 0},        {"s2", 8},         {"u2", 8},          {"f8e4m3", 8},
    {"f8e3m4", 8},       {"f8e8m0fnu", 8},  {"f4e2m1fn", 8},
}};

struct ArrayType {
  int type;
  std::vector<int64_t> dimensions;

  const ElementType& element() const { return kElementTypes.at(type); }

  size_t num_bytes() const {
    size_t bytes = element().bits / 8;
    for (const int64_t size : dimensions) bytes *= size;
    return bytes;
  }

  // Such as "bf16[2,128]".
  std::string text() const {
    std::string text(element().name);
    text += '[';
    for (const int64_t size : dimensions) {
      if (text.back() != '[') text += ',';
      text += std::to_string(size);
    }
    return text + ']';
  }
};

// ---- Buffers -----------------------------------------------------------------------

}  // namespace

namespace pjrt {

// Whoever creates, changes or destroys one holds state_mutex.
struct Buffer {
  Buffer(ArrayType array_type, Memory* in_memory)
      : type(std::move(array_type)), memory(in_memory), num_bytes(type.num_bytes()) {
    static int64_t next_id = 0;
    id = next_id++;
    for (size_t i = type.dimensions.size(); i-- > 0;) minor_to_major.push_back(i);
    Device& device = *memory->device;
    device.bytes_in_use += num_bytes;
    device.peak_bytes_in_use = std::max(device.peak_bytes_in_use, device.bytes_in_use);
  }

  ~Buffer() { release("was freed"); }

  // Gives the memory back. Whoever still uses it is told why it is gone.
  void release(const std::string& reason) {
    if (!gone.empty()) return;
    gone = reason;
    bytes.clear();
    bytes.shrink_to_fit();
    memory->device->bytes_in_use -= num_bytes;
  }

  void require(const std::string& use) const {
    if (gone.empty()) return;
    throw Failure{kInvalidArgument, "buffer " + std::to_string(id) + ", " +
                                        type.text() + ", " + gone + ", and is " + use};
  }

  ArrayType type;
  Memory* memory;
  size_t num_bytes;
  int64_t id;
  std::vector<int64_t> minor_to_major;
  std::string gone;         // why it may not be used any more
  std::vector<char> bytes;  // values; empty for zeros
};

}  // namespace pjrt

namespace {

void record_copy(std::string_view event, const Buffer& buffer) {
  record.write(recorder::Event(event)
                   .add("buffer", buffer.id)
                   .add("bytes", buffer.num_bytes));
}

void copy_from_host(Buffer& buffer, const void* data) {
  record_copy("copy_to_device", buffer);
  if (buffer.num_bytes > kLargestKeptBytes) return;
  const char* bytes = static_cast<const char*>(data);
  buffer.bytes.assign(bytes, bytes + buffer.num_bytes);
}

void copy_to_host(const Buffer& buffer, void* data) {
  buffer.require("copied from");
  record_copy("copy_to_host", buffer);
  if (buffer.bytes.empty()) {
    std::memset(data, 0, buffer.num_bytes);
  } else {
    std::memcpy(data, buffer.bytes.data(), buffer.num_bytes);
  }
}

// ---- Programs ----------------------------------------------------------------------

// What libtpu compiled, once for every handle to it.
struct CompiledProgram {
  int number;
  Executable* executable;
  std::string serialised;
  hlo::Summary summary;
  std::vector<ArrayType> results;
  std::string device_assignment;
  std::vector<Device*> devices;
  std::string fingerprint;
  int num_handles = 0;
};

}  // namespace

namespace pjrt {

struct Client {
  Topology* topology;
  std::string topology_name;
  std::vector<Device*> devices;
  std::vector<Memory*> memories;
};

struct LoadedExecutable {
  CompiledProgram* program;
  bool is_deleted = false;
};

}  // namespace pjrt

namespace {

std::map<const Executable*, CompiledProgram*> programs;

// Serialised programs are compiled anew when they are loaded: libtpu's own form can be
// loaded by a TPU only. Texts, each after its length.
std::string pack(const std::vector<std::string_view>& texts) {
  std::string packed;
  for (const std::string_view text : texts) {
    packed += std::to_string(text.size()) + ":";
    packed += text;
  }
  return packed;
}

std::vector<std::string> unpack(std::string_view packed) {
  std::vector<std::string> texts;
  while (!packed.empty()) {
    const size_t colon = packed.find(':');
    if (colon == std::string_view::npos) {
      throw Failure{kInvalidArgument, "a serialised program of another plug-in"};
    }
    const size_t size = std::stoul(std::string(packed.substr(0, colon)));
    packed.remove_prefix(colon + 1);
    texts.emplace_back(protobuf::take(packed, size));
  }
  return texts;
}

std::vector<ArrayType> result_types(Executable* executable) {
  ExecutableOutputTypesArgs types{};
  types.executable = executable;
  libtpu.call(kExecutableOutputElementTypes, types);
  ExecutableOutputDimensionsArgs shapes{};
  shapes.executable = executable;
  libtpu.call(kExecutableOutputDimensions, shapes);
  std::vector<ArrayType> results;
  const int64_t* dimensions = shapes.dimensions;
  for (size_t i = 0; i < types.num_outputs; i++) {
    const int64_t* end = dimensions + shapes.num_dimensions[i];
    results.push_back({types.types[i], {dimensions, end}});
    dimensions = end;
  }
  return results;
}

// The serialised HloModuleProto of an optimised program.
std::string optimised_module(Executable* executable) {
  Program program{};
  program.struct_size = sizeof program;
  ExecutableOptimizedProgramArgs args{};
  args.executable = executable;
  args.program = &program;
  libtpu.call(kExecutableOptimizedProgram, args);
  std::string with_config(program.code_size, '\0');
  program.code = with_config.data();
  libtpu.call(kExecutableOptimizedProgram, args);
  return std::string(hlo::module_of(with_config));
}

void set_devices(CompiledProgram& program, const Client& client,
                 std::string_view options) {
  program.device_assignment = hlo::device_assignment_of(options);
  if (program.device_assignment.empty()) {
    // One replica, one partition, device 0.
    program.device_assignment = {8, 1, 16, 1, 26, 3, 10, 1, 0};
  }
  for (const int64_t id : hlo::device_ids_of(program.device_assignment)) {
    program.devices.push_back(client.devices.at(id));
  }
}

// Compiles a program, and records it.
//   event: "compile", or "load" for one that was serialised before.
//   serialised_for: the topology that it was first compiled for.
LoadedExecutable* compile(Client& client, const Program& source,
                          std::string_view options, std::string_view event,
                          std::string_view serialised_for) {
  const auto start = std::chrono::steady_clock::now();
  CompileArgs args{};
  args.topology = client.topology;
  args.program = &source;
  args.options = options.data();
  args.options_size = options.size();
  libtpu.call(kCompile, args);
  const auto duration = std::chrono::steady_clock::now() - start;

  auto* program = new CompiledProgram;
  program->executable = args.executable;
  const std::string_view code(source.code, source.code_size);
  const std::string_view format(source.format, source.format_size);
  program->serialised = pack({serialised_for, format, code, options});
  program->results = result_types(args.executable);
  const std::string module = optimised_module(args.executable);
  program->summary = hlo::summarise(module);
  set_devices(*program, client, options);
  auto* loaded = new LoadedExecutable{program};
  {
    const std::lock_guard<std::mutex> lock(state_mutex);
    static int next_number = 0;
    program->number = next_number++;
    program->num_handles = 1;
    programs[program->executable] = program;
  }
  program->fingerprint = "compile-only-" + std::to_string(program->number);

  char stem[32];
  std::snprintf(stem, sizeof stem, "program-%04d", program->number);
  record.write_file(std::string(stem) + ".source", code);
  record.write_file(std::string(stem) + ".options", options);
  record.write_file(std::string(stem) + ".hlo", module);
  std::vector<std::string_view> results;
  std::vector<std::string> texts;
  for (const ArrayType& type : program->results) texts.push_back(type.text());
  for (const std::string& text : texts) results.push_back(text);
  record.write(
      recorder::Event(event)
          .add("program", program->number)
          .add("name", program->summary.name)
          .add("format", format)
          .add("topology", serialised_for)
          .add("milliseconds",
               std::chrono::duration_cast<std::chrono::milliseconds>(duration).count())
          .add("results", results));
  return loaded;
}

void drop_handle(CompiledProgram* program) {
  {
    const std::lock_guard<std::mutex> lock(state_mutex);
    if (--program->num_handles > 0) return;
    programs.erase(program->executable);
  }
  ExecutableArgs args{};
  args.executable = program->executable;
  libtpu.call(kExecutableDestroy, args);
  delete program;
}

CompiledProgram* program_of(const Executable* executable) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  return programs.at(executable);
}

// ---- Execution ---------------------------------------------------------------------

std::string argument_name(const CompiledProgram& program, size_t index) {
  return "argument " + std::to_string(index) + " of program " +
         std::to_string(program.number) + " (" + program.summary.name + ")";
}

void check_arguments(const CompiledProgram& program, Buffer* const* arguments,
                     size_t num_arguments) {
  const auto& expected = program.summary.parameter_dimensions;
  if (num_arguments != expected.size()) {
    throw Failure{kInvalidArgument,
                  "program " + std::to_string(program.number) + ": expected " +
                      std::to_string(expected.size()) + " arguments, got " +
                      std::to_string(num_arguments)};
  }
  for (size_t i = 0; i < num_arguments; i++) {
    const Buffer& buffer = *arguments[i];
    buffer.require("passed as " + argument_name(program, i));
    if (buffer.type.dimensions != expected[i]) {
      throw Failure{kInvalidArgument,
                    argument_name(program, i) + ": expected " +
                        ArrayType{buffer.type.type, expected[i]}.text() + ", got " +
                        buffer.type.text()};
    }
  }
}

void execute_on(const CompiledProgram& program, Device* device,
                Buffer* const* arguments, size_t num_arguments, Buffer** results,
                const std::set<int64_t>& not_donatable) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  check_arguments(program, arguments, num_arguments);
  std::vector<int64_t> argument_ids, result_ids, donated_ids;
  for (size_t i = 0; i < num_arguments; i++) {
    argument_ids.push_back(arguments[i]->id);
  }
  for (const hlo::Alias& alias : program.summary.aliases) {
    if (not_donatable.count(alias.parameter) > 0) continue;
    Buffer& buffer = *arguments[alias.parameter];
    donated_ids.push_back(buffer.id);
    buffer.release("was donated to program " + std::to_string(program.number) + " (" +
                    program.summary.name + ")");
  }
  for (size_t i = 0; i < program.results.size(); i++) {
    results[i] = new Buffer(program.results[i], device->memories.front());
    result_ids.push_back(results[i]->id);
  }
  record.write(recorder::Event("execute")
                   .add("program", program.number)
                   .add("device", device->id)
                   .add("arguments", argument_ids)
                   .add("results", result_ids)
                   .add("donated", donated_ids)
                   .add("bytes_in_use", device->bytes_in_use));
}

void execute(ExecuteArgs& args) {
  const CompiledProgram& program = *args.executable->program;
  if (args.executable->is_deleted) {
    throw Failure{kFailedPrecondition, "program " + std::to_string(program.number) +
                                           " was deleted, and is executed"};
  }
  if (args.num_devices > program.devices.size()) {
    throw Failure{kInvalidArgument,
                  "program " + std::to_string(program.number) + ": expected " +
                      std::to_string(program.devices.size()) +
                      " lists of arguments, got " + std::to_string(args.num_devices)};
  }
  const ExecuteOptions& options = *args.options;
  const std::set<int64_t> not_donatable(
      options.not_donatable, options.not_donatable + options.num_not_donatable);
  for (size_t i = 0; i < args.num_devices; i++) {
    Device* device = args.device != nullptr ? args.device : program.devices[i];
    execute_on(program, device, args.arguments[i], args.num_arguments,
               args.results[i], not_donatable);
    if (args.done != nullptr) args.done[i] = new Event;
  }
}

// ---- Events ------------------------------------------------------------------------

void event_destroy(EventArgs& args) { delete args.event; }
void event_is_ready(EventIsReadyArgs& args) { args.is_ready = true; }
void event_on_ready(EventOnReadyArgs& args) { args.callback(nullptr, args.user_arg); }

// ---- Client ------------------------------------------------------------------------

Topology* create_topology(const std::string& name) {
  const int64_t one_chip[] = {1, 1, 1};
  const std::string_view option_name = "chips_per_host_bounds";
  NamedValue option{};
  option.struct_size = sizeof option;
  option.name = option_name.data();
  option.name_size = option_name.size();
  option.type = kInt64List;
  option.int64_list = one_chip;
  option.value_size = 3;
  TopologyCreateArgs args{};
  args.name = name.data();
  args.name_size = name.size();
  args.options = &option;
  args.num_options = 1;
  libtpu.call(kTopologyCreate, args);
  return args.topology;
}

void client_create(ClientCreateArgs& args) {
  auto* client = new Client;
  client->topology_name = required_environment("COMPILE_ONLY_TPU_TOPOLOGY");
  client->topology = create_topology(client->topology_name);
  record.open(required_environment("COMPILE_ONLY_TPU_DUMP"));
  TopologyGetDeviceDescriptionsArgs descriptions{};
  descriptions.topology = client->topology;
  libtpu.call(kTopologyGetDeviceDescriptions, descriptions);
  for (size_t i = 0; i < descriptions.num_descriptions; i++) {
    DeviceDescriptionIdArgs id{};
    id.description = descriptions.descriptions[i];
    libtpu.call(kDeviceDescriptionId, id);
    auto* device = new Device{id.id, id.description, client->topology};
    int kind_id = 0;
    for (const char* kind : {"device", "pinned_host", "unpinned_host"}) {
      const int memory_id = static_cast<int>(client->memories.size());
      device->memories.push_back(new Memory{memory_id, kind_id++, kind, device});
      client->memories.push_back(device->memories.back());
    }
    client->devices.push_back(device);
  }
  args.client = client;
}

void client_platform_name(ClientStringArgs& args) {
  static constexpr std::string_view name = "tpu";
  args.text = name.data();
  args.text_size = name.size();
}

void client_platform_version(ClientStringArgs& args) {
  static constexpr std::string_view version = "compile-only TPU";
  args.text = version.data();
  args.text_size = version.size();
}

void client_process_index(ClientProcessIndexArgs& args) { args.process_index = 0; }

void client_devices(ClientDevicesArgs& args) {
  args.devices = args.client->devices.data();
  args.num_devices = args.client->devices.size();
}

void client_lookup_device(ClientLookupDeviceArgs& args) {
  for (Device* device : args.client->devices) {
    if (device->id == args.id) {
      args.device = device;
      return;
    }
  }
  throw Failure{kNotFound, "there is no device " + std::to_string(args.id)};
}

void client_memories(ClientMemoriesArgs& args) {
  args.memories = args.client->memories.data();
  args.num_memories = args.client->memories.size();
}

void client_topology(ClientTopologyArgs& args) {
  args.topology = args.client->topology;
}

void client_default_device_assignment(ClientDefaultDeviceAssignmentArgs& args) {
  for (size_t i = 0; i < args.size; i++) {
    args.device_ids[i] = args.client->devices.at(i)->id;
  }
}

void client_compile(ClientCompileArgs& args) {
  args.executable =
      compile(*args.client, *args.program, {args.options, args.options_size}, "compile",
              args.client->topology_name);
}

void client_buffer_from_host(ClientBufferFromHostArgs& args) {
  if (args.num_byte_strides > 0) {
    throw Failure{kUnimplemented, "a copy from the host with strides"};
  }
  ArrayType type{args.type, {args.dimensions, args.dimensions + args.num_dimensions}};
  Memory* memory = args.memory ? args.memory : args.device->memories.front();
  const std::lock_guard<std::mutex> lock(state_mutex);
  args.buffer = new Buffer(std::move(type), memory);
  copy_from_host(*args.buffer, args.data);
  args.done_with_host_buffer = new Event;
}

// ---- Devices and memories ----------------------------------------------------------

void device_get_description(DeviceGetDescriptionArgs& args) {
  args.description = args.device->description;
}

void device_is_addressable(DeviceIsAddressableArgs& args) {
  args.is_addressable = true;
}

void device_local_hardware_id(DeviceLocalHardwareIdArgs& args) {
  args.id = args.device->id;
}

void device_memories(DeviceMemoriesArgs& args) {
  args.memories = args.device->memories.data();
  args.num_memories = args.device->memories.size();
}

void device_default_memory(DeviceDefaultMemoryArgs& args) {
  args.memory = args.device->memories.front();
}

void device_memory_stats(DeviceMemoryStatsArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  args.bytes_in_use = args.device->bytes_in_use;
  args.peak_bytes_in_use = {args.device->peak_bytes_in_use, true};
  args.num_allocations = {};
  args.largest_allocation = {};
  args.bytes_limit = {kDeviceBytes, true};
  for (OptionalBytes& bytes : args.reservations_and_pools) bytes = {};
}

void memory_id(MemoryIdArgs& args) { args.id = args.memory->id; }
void memory_kind_id(MemoryIdArgs& args) { args.id = args.memory->kind_id; }

void memory_kind(MemoryStringArgs& args) {
  args.text = args.memory->kind.data();
  args.text_size = args.memory->kind.size();
}

void memory_devices(MemoryDevicesArgs& args) {
  args.devices = &args.memory->device;
  args.num_devices = 1;
}

// ---- Executables -------------------------------------------------------------------

void executable_destroy(ExecutableArgs& args) {
  drop_handle(program_of(args.executable));
}

void executable_serialize(ExecutableSerializeArgs& args) {
  const std::string& serialised = program_of(args.executable)->serialised;
  args.bytes = serialised.data();
  args.bytes_size = serialised.size();
  args.owner = nullptr;
  args.deleter = [](void*) {};
}

void executable_deserialize(ExecutableDeserializeArgs& args) {
  const auto texts = unpack({args.bytes, args.bytes_size});
  if (texts.size() != 4) {
    throw Failure{kInvalidArgument, "a serialised program of another plug-in"};
  }
  std::string code = texts[2];
  Program program{};
  program.struct_size = sizeof program;
  program.format = texts[1].data();
  program.format_size = texts[1].size();
  program.code = code.data();
  program.code_size = code.size();
  args.executable = compile(*args.client, program, texts[3], "load", texts[0]);
}

void loaded_destroy(LoadedExecutableArgs& args) {
  drop_handle(args.executable->program);
  delete args.executable;
}

void loaded_get_executable(LoadedExecutableGetExecutableArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  args.loaded->program->num_handles++;
  args.executable = args.loaded->program->executable;
}

void loaded_devices(LoadedExecutableDevicesArgs& args) {
  args.devices = args.executable->program->devices.data();
  args.num_devices = args.executable->program->devices.size();
}

void loaded_delete(LoadedExecutableArgs& args) { args.executable->is_deleted = true; }

void loaded_is_deleted(LoadedExecutableIsDeletedArgs& args) {
  args.is_deleted = args.executable->is_deleted;
}

void loaded_fingerprint(LoadedExecutableFingerprintArgs& args) {
  args.text = args.executable->program->fingerprint.data();
  args.text_size = args.executable->program->fingerprint.size();
}

void loaded_device_assignment(LoadedExecutableGetDeviceAssignmentArgs& args) {
  const std::string& assignment = args.executable->program->device_assignment;
  args.bytes = assignment.data();
  args.bytes_size = assignment.size();
  args.owner = nullptr;
  args.deleter = [](void*) {};
}

// ---- Buffers -----------------------------------------------------------------------

void buffer_destroy(BufferArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  delete args.buffer;
}

void buffer_delete(BufferArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  args.buffer->release("was deleted");
}

void buffer_element_type(BufferElementTypeArgs& args) {
  args.type = args.buffer->type.type;
}

void buffer_dimensions(BufferDimensionsArgs& args) {
  const std::vector<int64_t>& dimensions = args.buffer->type.dimensions;
  args.dimensions = dimensions.data();
  args.num_dimensions = dimensions.size();
}

void buffer_dynamic_dimensions(BufferDynamicDimensionsArgs& args) {
  args.indices = nullptr;
  args.num_indices = 0;
}

void buffer_memory_layout(BufferGetMemoryLayoutArgs& args) {
  args.layout = {};
  args.layout.struct_size = sizeof args.layout;
  args.layout.tiled.struct_size = sizeof args.layout.tiled;
  args.layout.tiled.minor_to_major = args.buffer->minor_to_major.data();
  args.layout.tiled.minor_to_major_size = args.buffer->minor_to_major.size();
}

void buffer_size(BufferSizeArgs& args) {
  args.size_in_bytes = args.buffer->num_bytes;
}

void buffer_device(BufferDeviceArgs& args) {
  args.device = args.buffer->memory->device;
}

void buffer_memory(BufferMemoryArgs& args) {
  args.memory = args.buffer->memory;
}

void buffer_is_deleted(BufferBoolArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  args.value = !args.buffer->gone.empty();
}

void buffer_is_on_cpu(BufferBoolArgs& args) { args.value = false; }
void buffer_ready_event(BufferReadyEventArgs& args) { args.event = new Event; }

void buffer_to_host(BufferToHostArgs& args) {
  const std::lock_guard<std::mutex> lock(state_mutex);
  const Buffer& buffer = *args.buffer;
  if (args.data == nullptr) {
    args.size = buffer.num_bytes;
    return;
  }
  copy_to_host(buffer, args.data);
  args.event = new Event;
}

// ---- Layouts -----------------------------------------------------------------------

LayoutsExtension layouts;
Function libtpu_topology_default_layout;

Layout* default_layout(Topology* topology, const ArrayType& type) {
  DefaultLayoutArgs args{};
  args.owner = topology;
  args.type = type.type;
  args.dimensions = type.dimensions.data();
  args.num_dimensions = type.dimensions.size();
  libtpu.call(libtpu_topology_default_layout, args);
  return args.layout;
}

void client_default_layout(DefaultLayoutArgs& args) {
  args.layout = default_layout(
      static_cast<Client*>(args.owner)->topology,
      {args.type, {args.dimensions, args.dimensions + args.num_dimensions}});
}

void buffer_layout(BufferLayoutArgs& args) {
  const Buffer& buffer = *args.buffer;
  args.layout = default_layout(buffer.memory->device->topology, buffer.type);
}

// ---- The table ---------------------------------------------------------------------

// Why libtpu could not be loaded. Whoever initialises the plug-in is told.
std::string load_failure;

Error* plugin_initialize(void* args) {
  if (!load_failure.empty()) return new_error(kFailedPrecondition, load_failure);
  return libtpu.function(kPluginInitialize)(args);
}

template <size_t... positions>
void fill_with_not_there(Api& api, std::index_sequence<positions...>) {
  ((api.functions[positions] = not_there<static_cast<int>(positions)>), ...);
}

void set_own_functions(Api& api) {
  const auto set = [&](Position position, Function function) {
    api.functions[position] = function;
  };
  set(kErrorDestroy, error_destroy);
  set(kErrorMessage, error_message);
  set(kErrorGetCode, error_get_code);
  set(kPluginInitialize, plugin_initialize);
  set(kEventDestroy, Entry<event_destroy>::call);
  set(kEventIsReady, Entry<event_is_ready>::call);
  set(kEventError, Entry<succeed<EventArgs>>::call);
  set(kEventAwait, Entry<succeed<EventArgs>>::call);
  set(kEventOnReady, Entry<event_on_ready>::call);
  set(kClientCreate, Entry<client_create>::call);
  set(kClientDestroy, Entry<succeed<ClientArgs>>::call);
  set(kClientPlatformName, Entry<client_platform_name>::call);
  set(kClientProcessIndex, Entry<client_process_index>::call);
  set(kClientPlatformVersion, Entry<client_platform_version>::call);
  set(kClientDevices, Entry<client_devices>::call);
  set(kClientAddressableDevices, Entry<client_devices>::call);
  set(kClientLookupDevice, Entry<client_lookup_device>::call);
  set(kClientLookupAddressableDevice, Entry<client_lookup_device>::call);
  set(kClientAddressableMemories, Entry<client_memories>::call);
  set(kClientCompile, Entry<client_compile>::call);
  set(kClientDefaultDeviceAssignment, Entry<client_default_device_assignment>::call);
  set(kClientBufferFromHostBuffer, Entry<client_buffer_from_host>::call);
  set(kClientTopology, Entry<client_topology>::call);
  set(kDeviceGetDescription, Entry<device_get_description>::call);
  set(kDeviceIsAddressable, Entry<device_is_addressable>::call);
  set(kDeviceLocalHardwareId, Entry<device_local_hardware_id>::call);
  set(kDeviceAddressableMemories, Entry<device_memories>::call);
  set(kDeviceDefaultMemory, Entry<device_default_memory>::call);
  set(kDeviceMemoryStats, Entry<device_memory_stats>::call);
  set(kMemoryId, Entry<memory_id>::call);
  set(kMemoryKind, Entry<memory_kind>::call);
  set(kMemoryKindId, Entry<memory_kind_id>::call);
  set(kMemoryDebugString, Entry<memory_kind>::call);
  set(kMemoryToString, Entry<memory_kind>::call);
  set(kMemoryAddressableByDevices, Entry<memory_devices>::call);
  set(kExecutableDestroy, Entry<executable_destroy>::call);
  set(kExecutableSerialize, Entry<executable_serialize>::call);
  set(kExecutableDeserializeAndLoad, Entry<executable_deserialize>::call);
  set(kLoadedExecutableDestroy, Entry<loaded_destroy>::call);
  set(kLoadedExecutableGetExecutable, Entry<loaded_get_executable>::call);
  set(kLoadedExecutableAddressableDevices, Entry<loaded_devices>::call);
  set(kLoadedExecutableDelete, Entry<loaded_delete>::call);
  set(kLoadedExecutableIsDeleted, Entry<loaded_is_deleted>::call);
  set(kLoadedExecutableExecute, Entry<execute>::call);
  set(kLoadedExecutableFingerprint, Entry<loaded_fingerprint>::call);
  set(kLoadedExecutableGetDeviceAssignment, Entry<loaded_device_assignment>::call);
  set(kBufferDestroy, Entry<buffer_destroy>::call);
  set(kBufferElementType, Entry<buffer_element_type>::call);
  set(kBufferDimensions, Entry<buffer_dimensions>::call);
  set(kBufferUnpaddedDimensions, Entry<buffer_dimensions>::call);
  set(kBufferDynamicDimensionIndices, Entry<buffer_dynamic_dimensions>::call);
  set(kBufferGetMemoryLayout, Entry<buffer_memory_layout>::call);
  set(kBufferOnDeviceSizeInBytes, Entry<buffer_size>::call);
  set(kBufferDevice, Entry<buffer_device>::call);
  set(kBufferMemory, Entry<buffer_memory>::call);
  set(kBufferDelete, Entry<buffer_delete>::call);
  set(kBufferIsDeleted, Entry<buffer_is_deleted>::call);
  set(kBufferToHostBuffer, Entry<buffer_to_host>::call);
  set(kBufferIsOnCpu, Entry<buffer_is_on_cpu>::call);
  set(kBufferReadyEvent, Entry<buffer_ready_event>::call);
}

// Functions that are given libtpu's objects only.
void pass_on_to_libtpu(Api& api) {
  const auto pass_on = [&](int first, int last) {
    for (int i = first; i <= last; i++) {
      api.functions[i] = libtpu.function(static_cast<Position>(i));
    }
  };
  pass_on(kPluginAttributes, kPluginAttributes);
  pass_on(kDeviceDescriptionId, kDeviceDescriptionToString);
  pass_on(kExecutableName, kExecutableOptimizedProgram);
  pass_on(kTopologyCreate, kTopologyAttributes);
  pass_on(kCompile, kExecutableOutputDimensions);
  pass_on(kExecutableFingerprint, kExecutableFingerprint);
  pass_on(kExecutableMemoryStats, kExecutableMemoryStats);
  pass_on(kExecuteContextCreate, kExecuteContextDestroy);
  pass_on(kTopologyDeserialize, kTopologyDeserialize);
}

Extension& libtpu_extension(ExtensionType type, size_t least_size) {
  for (Extension* extension = libtpu.extensions(); extension != nullptr;
       extension = extension->next) {
    if (extension->type == type && extension->struct_size >= least_size) {
      return *extension;
    }
  }
  throw std::runtime_error("libtpu lacks extension " + std::to_string(type) +
                           " of the PJRT C API, or has an old one");
}

// A list of extensions of our own: libtpu's list leads on to functions that would be
// given our objects.
void set_extensions(Api& api) {
  layouts = static_cast<LayoutsExtension&>(
      libtpu_extension(kLayoutsExtension, sizeof layouts));
  libtpu_topology_default_layout = layouts.topology_default_layout;
  layouts.struct_size = sizeof layouts;
  layouts.client_default_layout = Entry<client_default_layout>::call;
  layouts.buffer_layout = Entry<buffer_layout>::call;

  // Its functions are given topologies only, which are libtpu's.
  const Extension& topology =
      libtpu_extension(kTpuTopologyExtension, sizeof(Extension));
  static std::vector<char> topology_copy(topology.struct_size);
  std::memcpy(topology_copy.data(), &topology, topology.struct_size);
  auto* topologies = reinterpret_cast<Extension*>(topology_copy.data());

  api.extensions = &layouts;
  layouts.next = topologies;
  topologies->next = nullptr;
}

Api make_api() {
  Api api{};
  api.struct_size = sizeof api;
  api.version.struct_size = sizeof api.version;
  api.version.major = kMajorVersion;
  api.version.minor = kMinorVersion;
  fill_with_not_there(api, std::make_index_sequence<kNumFunctions>{});
  set_own_functions(api);
  try {
    libtpu.load(required_environment("COMPILE_ONLY_TPU_LIBTPU"));
    pass_on_to_libtpu(api);
    set_extensions(api);
  } catch (const std::exception& failure) {
    load_failure = failure.what();
  }
  return api;
}

}  // namespace

extern "C" const Api* GetPjrtApi() {
  static const Api api = make_api();
  return &api;
}
