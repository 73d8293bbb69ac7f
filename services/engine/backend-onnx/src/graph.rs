use std::collections::HashMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use checkpoint::{Dtype, SharedTensor, TensorView};
use layers::EngineError;
use prost::Message;

use crate::onnx::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto, TensorShapeProto,
    TypeProto, ValueInfoProto, attribute_proto::AttributeType, tensor_proto, tensor_shape_proto, type_proto,
};

/// Version of the operator set: the first with `Attention` (23). ONNX Runtime 1.31, the oldest that is accepted, knows it.
const OPERATOR_SET: i64 = 23;
/// Version of the file format that belongs to the operator set.
const FORMAT_VERSION: i64 = 11;
/// The runtime's own operators, and their version.
const RUNTIME_DOMAIN: &str = "com.microsoft";
const RUNTIME_OPERATOR_SET: i64 = 1;

/// A tensor that flows through a [`Graph`]: an input, a weight, a constant or the output of a node.
#[derive(Debug, Clone)]
pub struct Value(Arc<str>);

impl Value {
    /// An optional input that is left out.
    pub(crate) fn none() -> Self {
        Self("".into())
    }
}

/// One dimension of an input.
#[derive(Debug, Clone, Copy)]
pub enum Dim {
    Fixed(usize),
    /// Any size; the same name means the same size.
    Named(&'static str),
}

/// A model under construction. Everything computes in f32; weights stored as f16 or bf16 are widened when the graph is loaded.
///
/// Weights are not copied into the graph: it says where in the checkpoint's files they lie.
#[derive(Debug, Default)]
pub struct Graph {
    proto: GraphProto,
    weights: Vec<Weight>,
    /// Weights by name in the checkpoint, so that one used twice is there once.
    known: HashMap<String, Value>,
    values: usize,
}

/// A weight and the place in its file.
#[derive(Debug)]
struct Weight {
    /// Index among the graph's initializers.
    initializer: usize,
    tensor: SharedTensor,
    file: PathBuf,
    /// Bytes from the start of the file.
    offset: u64,
}

/// A graph as the runtime takes it.
pub(crate) struct Model {
    pub bytes: Vec<u8>,
    /// Where the runtime finds the files that the model names.
    pub folder: Option<String>,
    /// Weights without such a folder, under the names by which the model calls their bytes.
    pub in_memory: Vec<(String, SharedTensor)>,
    /// All weights, in the order of the graph.
    pub weights: Vec<SharedTensor>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self { proto: GraphProto { name: Some("janua".into()), ..GraphProto::default() }, ..Self::default() }
    }

    /// An f32 input.
    pub fn input(&mut self, name: &str, shape: &[Dim]) -> Value {
        self.add_input(name, tensor_proto::DataType::Float, shape)
    }

    /// An i64 input.
    pub fn input_ids(&mut self, name: &str, shape: &[Dim]) -> Value {
        self.add_input(name, tensor_proto::DataType::Int64, shape)
    }

    fn add_input(&mut self, name: &str, element: tensor_proto::DataType, shape: &[Dim]) -> Value {
        let dim = |dim: &Dim| tensor_shape_proto::Dimension {
            value: Some(match *dim {
                Dim::Fixed(size) => tensor_shape_proto::dimension::Value::DimValue(size as i64),
                Dim::Named(name) => tensor_shape_proto::dimension::Value::DimParam(name.into()),
            }),
            denotation: None,
        };
        self.proto.input.push(info(name, element, Some(TensorShapeProto { dim: shape.iter().map(dim).collect() })));
        Value(name.into())
    }

    /// Makes `value` an f32 output called `name`. Outputs come back in the order of these calls.
    pub fn output(&mut self, name: &str, value: &Value) {
        self.proto.node.push(NodeProto {
            op_type: Some("Identity".into()),
            input: vec![value.0.to_string()],
            output: vec![name.into()],
            ..NodeProto::default()
        });
        self.proto.output.push(info(name, tensor_proto::DataType::Float, None));
    }

    /// A weight, as f32, whatever float type it is stored in.
    pub fn weight(&mut self, tensor: &TensorView<'_>) -> Result<Value, EngineError> {
        if let Some(value) = self.known.get(tensor.name) {
            return Ok(value.clone());
        }
        let element = match tensor.dtype {
            Dtype::F32 => tensor_proto::DataType::Float,
            Dtype::F16 => tensor_proto::DataType::Float16,
            Dtype::BF16 => tensor_proto::DataType::Bfloat16,
            other => return Err(EngineError::Checkpoint(format!("tensor {}: a weight cannot be {other}", tensor.name))),
        };
        let stored = self.fresh();
        let location = tensor.location();
        self.weights.push(Weight {
            initializer: self.proto.initializer.len(),
            tensor: tensor.owned(),
            file: location.file.to_path_buf(),
            offset: location.offset,
        });
        self.proto.initializer.push(TensorProto {
            name: Some(stored.0.to_string()),
            dims: tensor.shape.iter().map(|&size| size as i64).collect(),
            data_type: Some(element as i32),
            data_location: Some(tensor_proto::DataLocation::External as i32),
            ..TensorProto::default()
        });
        let value = match tensor.dtype {
            Dtype::F32 => stored,
            // Computed once, when the runtime folds constants.
            _ => self.node("Cast", &[&stored], vec![int("to", tensor_proto::DataType::Float as i64)]),
        };
        self.known.insert(tensor.name.to_owned(), value.clone());
        Ok(value)
    }

    /// An f32 constant, row-major.
    pub fn floats(&mut self, shape: &[usize], values: &[f32]) -> Value {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(tensor_proto::DataType::Float, shape, data)
    }

    /// A vector of i64 constants.
    pub fn ints(&mut self, values: &[i64]) -> Value {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(tensor_proto::DataType::Int64, &[values.len()], data)
    }

    fn constant(&mut self, element: tensor_proto::DataType, shape: &[usize], data: Vec<u8>) -> Value {
        let value = self.fresh();
        self.proto.initializer.push(TensorProto {
            name: Some(value.0.to_string()),
            dims: shape.iter().map(|&size| size as i64).collect(),
            data_type: Some(element as i32),
            raw_data: Some(data),
            ..TensorProto::default()
        });
        value
    }

    /// A node with one output.
    pub(crate) fn node(&mut self, operator: &str, inputs: &[&Value], attributes: Vec<AttributeProto>) -> Value {
        let [value] = self.nodes(operator, inputs, attributes);
        value
    }

    /// A node with one output, of an operator that only the runtime has.
    pub(crate) fn runtime_node(&mut self, operator: &str, inputs: &[&Value], attributes: Vec<AttributeProto>) -> Value {
        let value = self.node(operator, inputs, attributes);
        if let Some(node) = self.proto.node.last_mut() {
            node.domain = Some(RUNTIME_DOMAIN.into());
        }
        value
    }

    /// A node with `N` outputs.
    pub(crate) fn nodes<const N: usize>(&mut self, operator: &str, inputs: &[&Value], attributes: Vec<AttributeProto>) -> [Value; N] {
        let outputs = std::array::from_fn(|_| self.fresh());
        self.proto.node.push(NodeProto {
            op_type: Some(operator.into()),
            input: inputs.iter().map(|value| value.0.to_string()).collect(),
            output: outputs.iter().map(|value| value.0.to_string()).collect(),
            attribute: attributes,
            ..NodeProto::default()
        });
        outputs
    }

    fn fresh(&mut self) -> Value {
        self.values += 1;
        Value(format!("v{}", self.values).into())
    }

    /// Says where each weight lies, and writes the graph down.
    ///
    /// The runtime maps files of one folder by itself and reads weights where they lie. Shards behind links into several folders have to be
    /// handed over in memory, all of them, and are copied.
    pub(crate) fn finish(mut self) -> Model {
        let folder = self.folder();
        let mut in_memory = Vec::new();
        for (index, weight) in self.weights.iter().enumerate() {
            let (location, offset) = match folder.is_some().then(|| weight.file.file_name().and_then(OsStr::to_str)).flatten() {
                Some(name) => (name.to_owned(), weight.offset),
                None => {
                    in_memory.push((format!("weight{index}"), weight.tensor.clone()));
                    (format!("weight{index}"), 0)
                }
            };
            let entries = [("location", location), ("offset", offset.to_string()), ("length", weight.tensor.bytes().len().to_string())];
            let entry = |(key, value): (&str, String)| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
            self.proto.initializer[weight.initializer].external_data = entries.into_iter().map(entry).collect();
        }
        let model = ModelProto {
            ir_version: Some(FORMAT_VERSION),
            producer_name: Some("janua".into()),
            opset_import: [("", OPERATOR_SET), (RUNTIME_DOMAIN, RUNTIME_OPERATOR_SET)]
                .map(|(domain, version)| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) })
                .into(),
            graph: Some(self.proto),
            ..ModelProto::default()
        };
        Model { bytes: model.encode_to_vec(), folder, in_memory, weights: self.weights.into_iter().map(|weight| weight.tensor).collect() }
    }

    /// The folder that holds all weight files, where there is one and its names are text.
    fn folder(&self) -> Option<String> {
        let folder = self.weights.first()?.file.parent()?;
        let all_there = self.weights.iter().all(|weight| weight.file.parent() == Some(folder) && weight.file.to_str().is_some());
        if all_there { folder.to_str().map(str::to_owned) } else { None }
    }
}

fn info(name: &str, element: tensor_proto::DataType, shape: Option<TensorShapeProto>) -> ValueInfoProto {
    let tensor = type_proto::Tensor { elem_type: Some(element as i32), shape };
    let r#type = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: Some(name.into()), r#type: Some(r#type), ..ValueInfoProto::default() }
}

pub(crate) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto { name: Some(name.into()), i: Some(value), r#type: Some(AttributeType::Int as i32), ..AttributeProto::default() }
}

pub(crate) fn ints(name: &str, values: &[usize]) -> AttributeProto {
    let ints = values.iter().map(|&value| value as i64).collect();
    AttributeProto { name: Some(name.into()), ints, r#type: Some(AttributeType::Ints as i32), ..AttributeProto::default() }
}

pub(crate) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto { name: Some(name.into()), f: Some(value), r#type: Some(AttributeType::Float as i32), ..AttributeProto::default() }
}

pub(crate) fn text(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.into()),
        s: Some(value.into()),
        r#type: Some(AttributeType::String as i32),
        ..AttributeProto::default()
    }
}
