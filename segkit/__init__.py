"""segkit: attention U-Nets for medical images, and gate maps on the patient's own voxel grid."""
