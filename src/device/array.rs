//! A matrix of activations that lies on the host or on a device. The network composes operations over arrays and does not
//! know where they lie: each operation dispatches once per direction. It does not depend on operations.
//! Read `matrix.rs` beside it next.

use anyhow::{Result, bail};
use candle_core::Tensor;

use super::{Device, Element, Matrix};

/// A matrix of activations, (rows, columns). A clone shares the memory.
#[derive(Clone, Debug)]
pub enum Array {
    /// A contiguous f32 tensor on the CPU.
    Host(Tensor),
    /// A matrix of a device, in f32 or in the element type of its products' operands.
    Device(Matrix),
}

impl Array {
    /// (rows, columns).
    ///
    /// # Errors
    /// If a tensor is not a matrix.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        Ok(match self {
            Self::Host(tensor) => tensor.dims2()?,
            Self::Device(matrix) => (matrix.rows(), matrix.cols()),
        })
    }

    /// The tensor of an array on the host.
    ///
    /// # Errors
    /// If the array lies on a device.
    pub fn host(&self) -> Result<&Tensor> {
        match self {
            Self::Host(tensor) => Ok(tensor),
            Self::Device(matrix) => bail!("a host operation got a matrix that lies on {}", matrix.device().name()),
        }
    }

    /// The matrix of an array on a device.
    ///
    /// # Errors
    /// If the array lies on the host.
    pub fn device(&self) -> Result<&Matrix> {
        match self {
            Self::Device(matrix) => Ok(matrix),
            Self::Host(tensor) => bail!("a device operation got a tensor {:?} that lies on the host", tensor.dims()),
        }
    }

    /// The device that holds the array, `None` for the host.
    pub fn place(&self) -> Option<&Device> {
        match self {
            Self::Host(_) => None,
            Self::Device(matrix) => Some(matrix.device()),
        }
    }

    /// The values as an f32 tensor on the host; a device's are downloaded.
    ///
    /// # Errors
    /// If the download fails.
    pub fn to_host(&self) -> Result<Tensor> {
        match self {
            Self::Host(tensor) => Ok(tensor.clone()),
            Self::Device(matrix) => {
                Ok(Tensor::from_vec(matrix.to_f32()?, (matrix.rows(), matrix.cols()), &candle_core::Device::Cpu)?)
            }
        }
    }

    /// Puts many arrays onto the host. The f32 matrices of one device are waited for once; a vector (1, N) of a device becomes a
    /// tensor (1, N).
    ///
    /// # Errors
    /// If a download fails; some arrays may be on the host then.
    pub fn all_to_host(arrays: Vec<&mut Self>) -> Result<()> {
        let mut of_device: Vec<(&mut Self, Matrix)> = vec![];
        for array in arrays {
            match &*array {
                Self::Host(_) => {}
                Self::Device(matrix) => {
                    let matrix = matrix.clone();
                    of_device.push((array, matrix));
                }
            }
        }
        let Some(device) = of_device.first().map(|(_, matrix)| matrix.device().clone()) else { return Ok(()) };
        let (at_once, others): (Vec<_>, Vec<_>) = of_device
            .into_iter()
            .partition(|(_, matrix)| matrix.element() == Element::F32 && matrix.device().ptr_eq(&device));
        let matrices: Vec<&Matrix> = at_once.iter().map(|(_, matrix)| matrix).collect();
        let read = device.read_each(&matrices)?;
        for ((array, matrix), values) in at_once.into_iter().zip(read) {
            let shape = (matrix.rows(), matrix.cols());
            *array = Self::Host(Tensor::from_vec(values, shape, &candle_core::Device::Cpu)?);
        }
        for (array, _) in others {
            *array = Self::Host(array.to_host()?);
        }
        Ok(())
    }

    /// A tensor's values on `device` in f32, or the tensor itself for the host.
    ///
    /// # Errors
    /// If the upload fails, or the tensor is not a matrix.
    pub fn on(tensor: Tensor, device: Option<&Device>) -> Result<Self> {
        let Some(device) = device else { return Ok(Self::Host(tensor)) };
        let (rows, cols) = tensor.dims2()?;
        Ok(Self::Device(device.upload_f32(&tensor.flatten_all()?.to_vec1::<f32>()?, rows, cols)?))
    }

    /// The element type of the values.
    pub fn element(&self) -> Element {
        match self {
            Self::Host(_) => Element::F32,
            Self::Device(matrix) => matrix.element(),
        }
    }
}

impl From<Tensor> for Array {
    fn from(tensor: Tensor) -> Self {
        Self::Host(tensor)
    }
}

impl From<Matrix> for Array {
    fn from(matrix: Matrix) -> Self {
        Self::Device(matrix)
    }
}
