// What execution has to know of an optimised program: its parameters and its aliases.

#ifndef COMPILE_ONLY_TPU_HLO_H_
#define COMPILE_ONLY_TPU_HLO_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "protobuf.h"

namespace hlo {

// An output that takes over the memory of a parameter.
struct Alias {
  int64_t output;  // 0 if the program's result is no tuple
  int64_t parameter;
};

struct Summary {
  std::string name;
  std::vector<std::vector<int64_t>> parameter_dimensions;
  std::vector<Alias> aliases;
};

// The HloModuleProto of what PJRT calls an optimised program: HloModuleProtoWithConfig.
inline std::string_view module_of(std::string_view program) {
  return protobuf::bytes_of(program, 1);
}

inline Summary summarise(std::string_view module) {
  using namespace protobuf;
  Summary summary;
  summary.name = bytes_of(module, 1);
  const std::string_view program_shape = bytes_of(module, 4);
  for (const std::string_view shape : messages_of(program_shape, 1)) {
    summary.parameter_dimensions.push_back(integers_of(shape, 3));
  }
  for (const std::string_view entry : messages_of(bytes_of(module, 8), 1)) {
    const std::vector<int64_t> output = integers_of(entry, 1);
    summary.aliases.push_back(
        {output.empty() ? 0 : output.front(), integer_of(entry, 2)});
  }
  return summary;
}

// The serialised assignment of devices in serialised compile options, or an empty one.
inline std::string_view device_assignment_of(std::string_view compile_options) {
  return protobuf::bytes_of(protobuf::bytes_of(compile_options, 3), 9);
}

// Ids of the devices of an assignment, of each replica and partition.
inline std::vector<int64_t> device_ids_of(std::string_view assignment) {
  std::vector<int64_t> ids;
  for (const std::string_view computation : protobuf::messages_of(assignment, 3)) {
    for (const int64_t id : protobuf::integers_of(computation, 1)) ids.push_back(id);
  }
  return ids;
}

}  // namespace hlo

#endif  // COMPILE_ONLY_TPU_HLO_H_
