"""Files: volumes, DICOM, archives, pictures, and writing them whole."""
