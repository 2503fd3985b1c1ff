"""Files: volumes, DICOM, archives, pictures, and complete writing."""
